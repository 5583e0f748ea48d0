"""Which faults come when: drawn from the seed alone. And what a stack must offer to be harmed by them."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.chaos.settings import ChaosSettings


class FaultKind(enum.Enum):
    """A verb and whom it harms: the members of a tier, or what passes from one tier (the client) to a member."""

    KILL_PREFILL = "kill prefill"
    KILL_DECODE = "kill decode"
    STOP_PREFILL = "stop prefill"
    STOP_DECODE = "stop decode"
    RESTART_PREFILL = "restart prefill"
    RESTART_DECODE = "restart decode"
    STOP_ROUTER = "stop router"
    KILL_REDIS = "kill redis"
    STOP_REDIS = "stop redis"
    FLUSH_REDIS = "flush redis"
    CUT_ROUTER_PREFILL = "cut router-prefill"
    CUT_ROUTER_DECODE = "cut router-decode"
    CUT_PREFILL_DECODE = "cut prefill-decode"
    SILENCE_ROUTER_PREFILL = "silence router-prefill"
    SILENCE_ROUTER_DECODE = "silence router-decode"
    SILENCE_PREFILL_DECODE = "silence prefill-decode"
    SLOW_ROUTER_PREFILL = "slow router-prefill"
    SLOW_ROUTER_DECODE = "slow router-decode"
    SLOW_PREFILL_DECODE = "slow prefill-decode"
    FLIP = "flip prefill-decode"

    @property
    def verb(self) -> str:
        return self.value.split()[0]

    @property
    def place(self) -> str:
        """All but the verb."""
        return self.value.split()[1]

    @property
    def tier(self) -> str:
        """Whose member is harmed."""
        return self.place.rpartition("-")[2]

    @property
    def client(self) -> str:
        """The tier on the other side of a network fault; empty for the other kinds."""
        return self.place.rpartition("-")[0]


_WEIGHTS: Mapping[FaultKind, int] = {
    FaultKind.KILL_PREFILL: 4,
    FaultKind.KILL_DECODE: 4,
    FaultKind.STOP_PREFILL: 4,
    FaultKind.STOP_DECODE: 4,
    FaultKind.RESTART_PREFILL: 1,
    FaultKind.RESTART_DECODE: 1,
    FaultKind.STOP_ROUTER: 1,
    FaultKind.KILL_REDIS: 1,
    FaultKind.STOP_REDIS: 2,
    FaultKind.FLUSH_REDIS: 2,
    FaultKind.CUT_ROUTER_PREFILL: 2,
    FaultKind.CUT_ROUTER_DECODE: 2,
    FaultKind.CUT_PREFILL_DECODE: 2,
    FaultKind.SILENCE_ROUTER_PREFILL: 1,
    FaultKind.SILENCE_ROUTER_DECODE: 1,
    FaultKind.SILENCE_PREFILL_DECODE: 1,
    FaultKind.SLOW_ROUTER_PREFILL: 1,
    FaultKind.SLOW_ROUTER_DECODE: 1,
    FaultKind.SLOW_PREFILL_DECODE: 1,
    FaultKind.FLIP: 4,
}
_LONGER = 3.0
"""Silence lasts longer than other faults: the longest outlasts the keepalive of the connections."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` since the fault before; ``number`` picks one of the tier; ``for_s`` is how long a fault lasts that
    has an end of its own, and ``num_flips`` how many bits are flipped where bits are."""

    after_s: float
    kind: FaultKind
    number: int
    for_s: float
    num_flips: int

    @property
    def lasts(self) -> bool:
        return self.kind.verb in ("stop", "cut", "silence", "slow")


def schedule(settings: ChaosSettings) -> Iterator[Fault]:
    """Without end. Gaps are even between half and one and a half of the mean; what lasts is mostly short."""
    rng = random.Random(f"faults {settings.seed}")
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        yield Fault(
            after_s=settings.fault_every_s * rng.uniform(0.5, 1.5),
            kind=kind,
            number=rng.randrange(1 << 16),
            for_s=0.3 * 10.0 ** rng.uniform(0.0, 1.2) * (_LONGER if kind.verb == "silence" else 1.0),
            num_flips=round(10.0 ** rng.uniform(0.0, 1.2)),
        )


class Network(Protocol):
    """The ways between ``client``, a tier, and the member ``name`` of another one that it connects to."""

    @property
    def num_flipped(self) -> int:
        """Bits that were flipped so far."""

    def cut(self, client: str, name: str) -> None:
        """All connections break, and new ones are refused, until ``mend``."""

    def silence(self, client: str, name: str) -> None:
        """Nothing passes, and nothing says so, until ``mend``: then it arrives late, and in order."""

    def slow(self, client: str, name: str) -> None:
        """All that passes is delayed, until ``mend``."""

    def mend(self, client: str, name: str) -> None: ...

    def flip(self, client: str, name: str, num_flips: int) -> None:
        """One bit in each of the next ``num_flips`` payload frames that the client sends; 0: in no further one."""


class Stack(Protocol):
    """A running stack. The members of a tier (prefill, decode, router, redis) have names; harming one that is not
    running just now does nothing."""

    @property
    def network(self) -> Network: ...

    @property
    def base_url(self) -> str:
        """Without /v1."""

    def members(self, tier: str) -> Sequence[str]: ...

    def kill(self, name: str) -> None:
        """At once. It comes back by itself."""

    def restart(self, name: str) -> None:
        """In order: it may finish its work. It comes back by itself."""

    def stop(self, name: str) -> None:
        """It is not scheduled any more, and does not know it, until ``go_on``."""

    def go_on(self, name: str) -> None: ...

    async def flush(self) -> None:
        """Empties Redis. Does nothing where it cannot be reached."""

    async def is_whole(self, tier: str = "") -> bool:
        """Whether the router would use every member of ``tier``, or of all."""

    async def leftovers(self) -> Mapping[str, int]:
        """What is still held, by whom: blocks neither free nor cached, hand-offs open on the ledger. Empty: nothing."""
