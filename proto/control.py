"""The messages between a router and a worker, multiplexed on one long-lived stream per pair.

    router → P       Prefill, Redirect
    router → D       Attach
    router → both    Hello, Abort, Renew
    worker → router  Welcome, Tokens, Progress, Rejected, Failed, LoadReport

The stream's end is the news of a death: a worker frees what a lost router's requests hold, once their lease ends or
another stream of the same router epoch has not come back.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import Request, TokenOut


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker as another one addresses it: ``address`` is host:port of its gRPC service."""

    worker: WorkerId
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of the router. ``worker_epoch`` is the incarnation it means; empty: any."""

    router_epoch: Epoch
    worker_epoch: Epoch
    wire_version: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute this prompt, and what a resumed request of one choice has already (``request.forced``), sample the next
    token of every choice, and hand the blocks to ``decode``. They are kept for ``lease_s`` unless renewed."""

    request: Request
    generation: Generation
    decode: Peer
    lease_s: float


@dataclass(frozen=True, slots=True)
class Redirect:
    """Hand the blocks that P still holds to another decode worker, under the next generation."""

    request: RequestId
    generation: Generation
    decode: Peer


@dataclass(frozen=True, slots=True)
class Attach:
    """Stream me this request's tokens from ``position`` on (per choice; for a new one, zeros).

    ``local``: D computes the prompt itself, and what a resumed request has already (``request.forced``). Otherwise the
    KV comes by a hand-off under ``generation``, before or after this message.
    """

    request: Request
    generation: Generation
    local: bool
    lease_s: float
    positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Abort:
    """Let go of everything of this request up to ``generation``. Answered by silence; may be repeated.

    ``choices`` names the only ones to end (a stop string matched in the router); empty: the whole request. A worker
    that does not run these choices yet may forget this: the router says it again once the worker reports ADOPTED.
    """

    request: RequestId
    generation: Generation
    choices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Renew:
    """Extends the leases of ``requests`` to ``lease_s`` from now."""

    requests: tuple[RequestId, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class Welcome:
    """First message of the worker."""

    worker: WorkerId
    epoch: Epoch
    role: Role
    wire_version: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step made for the requests of this router: a first token from P, any token from D."""

    generation_of: tuple[tuple[RequestId, Generation], ...]
    tokens: tuple[TokenOut, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """A request entered ``stage`` on this worker. ``num_cached`` counts prompt tokens served from its prefix cache,
    ``num_bytes`` the payload bytes moved (in ADOPTED, from D)."""

    request: RequestId
    generation: Generation
    stage: Stage
    num_cached: int = 0
    num_bytes: int = 0
    duration_s: float = 0.0
    """Seconds spent in the stage that this one ends, on the worker's own clock."""


class RejectReason(enum.Enum):
    FULL = "full"
    """The queue is at its bound: try another worker, or answer 429."""
    DRAINING = "draining"
    REFUSED = "refused"
    """(P) D refused the offer; the blocks are HELD: redirect or abort."""
    MISMATCH = "mismatch"
    """(P) D can never take these blocks: another layout, no common transport, or too many of them. They are HELD."""
    PEER_LOST = "peer_lost"
    """(P) D is gone before Adopted; the blocks are HELD. (D) P is gone before Seal; everything is freed."""
    STALE = "stale"
    """This try is over. (P, held) It is over at D, which knows why and tells its router; the blocks are HELD."""
    UNKNOWN = "unknown"
    """(D) Nothing is known of the request to attach to, or (P) to redirect."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The worker cannot go on with the request, through no fault of the request."""

    request: RequestId
    generation: Generation
    reason: RejectReason
    message: str = ""
    retry_after_s: float | None = None
    held: bool = False
    """(P) the blocks are still held under the lease, so a Redirect needs no new prefill."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request itself cannot be served by this worker: ``status`` and ``kind`` are of ``proto.errors``."""

    request: RequestId
    generation: Generation
    status: int
    kind: str
    message: str
    param: str | None = None


SOON_TOKENS = 32
"""How many tokens ahead ``Load`` looks for blocks that will be free: about a second of a sequence that generates."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is. Token counts are of prompt tokens not yet computed."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    tokens_per_s: float = 0.0
    """Prompt tokens computed per second of busy time, lately; 0 when unknown."""
    num_soon_free_blocks: int = 0
    """Blocks that nobody has but sequences that are over, or generate and end within SOON_TOKENS more tokens by their
    limits. Any other may end as soon, by what it says. 0 from a worker of an older version, too."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    load: Load


@dataclass(frozen=True, slots=True)
class ModelCard:
    """All a router needs to know of the model, so that it needs neither torch nor the checkpoint.

    ``files`` holds tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json, generation_config.json, ...
    """

    model: str
    served_names: tuple[str, ...]
    digest: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    layout: str
    hash_namespace: str
    files: dict[str, bytes] = field(default_factory=dict)


FromRouter = Hello | Prefill | Redirect | Attach | Abort | Renew
FromWorker = Welcome | Tokens | Progress | Rejected | Failed | LoadReport
