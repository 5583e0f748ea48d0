"""The messages by which a prompt's KV blocks change owner, from a prefill worker (P) to a decode worker (D).

Every message carries a Fence. A message whose fence does not match the receiver's view is answered with Stale and
counted, never applied. Block indices count a request's blocks from 0; block ids never cross the wire, except as places
in memory that P exports (``Located``).

    P → D   Offer, Frame, Seal, Withdraw
    D → P   Grant, Refuse, Ack, Nack, Adopted, Stale
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from proto.ids import BlockHash, Epoch, Generation, RequestId


@dataclass(frozen=True, slots=True)
class Fence:
    """Which try of which request, between which two process incarnations."""

    request: RequestId
    generation: Generation
    prefill_epoch: Epoch
    decode_epoch: Epoch

    def redirected(self, generation: Generation, decode_epoch: Epoch) -> Fence:
        return replace(self, generation=generation, decode_epoch=decode_epoch)


class RefuseReason(enum.Enum):
    FULL = "full"
    DRAINING = "draining"
    MISMATCH = "mismatch"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class TransportOffer:
    """A way in which P can hand over payloads. ``detail`` is the transport's own (where to read a nonce, say)."""

    name: str
    detail: bytes = b""


@dataclass(frozen=True, slots=True)
class Offer:
    """P is about to compute the prompt: may I send you its blocks?

    ``hashes`` has one entry per block, the last one of a partial block where the prompt does not end on a boundary.
    """

    fence: Fence
    layout: str
    layout_text: str
    numerics: str
    num_tokens: int
    num_choices: int
    hashes: tuple[BlockHash, ...]
    transports: tuple[TransportOffer, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class Grant:
    """Room is reserved. D already holds the first ``num_present`` blocks (pinned); send the others."""

    fence: Fence
    num_present: int
    transport: str


@dataclass(frozen=True, slots=True)
class Refuse:
    fence: Fence
    reason: RefuseReason
    message: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """Where D reads a block's bytes itself: ``offset`` into the memory that P exports."""

    offset: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One block. ``checksum`` covers the payload and is seeded with the block's hash."""

    fence: Fence
    index: int
    checksum: int
    payload: bytes | memoryview | Located


@dataclass(frozen=True, slots=True)
class Ack:
    """Every block below ``upto`` is verified in D's memory (present ones included)."""

    fence: Fence
    upto: int


@dataclass(frozen=True, slots=True)
class Nack:
    """Block ``index`` was damaged: send it again."""

    fence: Fence
    index: int


@dataclass(frozen=True, slots=True)
class SealedChoice:
    """The first token of one choice. ``state`` is for grammars, whose state cannot be rebuilt from tokens alone."""

    first_token: int
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class Seal:
    """The prompt is computed: it has ``num_blocks`` blocks, ``num_tokens_last`` valid tokens in the last one."""

    fence: Fence
    num_blocks: int
    num_tokens_last: int
    choices: tuple[SealedChoice, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Aborted, redirected, or finished at its first token: D frees."""

    fence: Fence
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Adopted:
    """Every block is verified; D owns the request's KV from here on."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Stale:
    """Refused: another epoch, or a try that is over; ``highest`` is the newest one seen. D frees what it has reserved.
    P keeps its blocks, which may be for another try: only the router and the lease let go of them."""

    fence: Fence
    highest: Generation


FromPrefill = Offer | Frame | Seal | Withdraw | Stale
FromDecode = Grant | Refuse | Ack | Nack | Adopted | Stale
HandoffMessage = Offer | Frame | Seal | Withdraw | Grant | Refuse | Ack | Nack | Adopted | Stale
