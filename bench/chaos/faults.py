"""Which faults come when: drawn from the seed alone. And what a stack must offer to be harmed by them."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.chaos.settings import ChaosSettings


class FaultKind(enum.Enum):
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

    @property
    def verb(self) -> str:
        return self.value.split()[0]

    @property
    def tier(self) -> str:
        return self.value.split()[1]


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
}


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` since the fault before; ``number`` picks one of the tier; ``for_s`` is how long a stop lasts."""

    after_s: float
    kind: FaultKind
    number: int
    for_s: float


def schedule(settings: ChaosSettings) -> Iterator[Fault]:
    """Without end. Gaps are even between half and one and a half of the mean; stops are mostly short."""
    rng = random.Random(f"faults {settings.seed}")
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    while True:
        yield Fault(
            after_s=settings.fault_every_s * rng.uniform(0.5, 1.5),
            kind=rng.choices(kinds, weights)[0],
            number=rng.randrange(1 << 16),
            for_s=0.3 * 10.0 ** rng.uniform(0.0, 1.2),
        )


class Stack(Protocol):
    """A running stack. The members of a tier (prefill, decode, router, redis) have names; harming one that is not
    running just now does nothing."""

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
