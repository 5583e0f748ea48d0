"""How each stage of a request is reached, and held until the fault has struck."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proto.control import Role
from proto.lifecycle import Stage
from tests.support.arena import ROUTER, Answer, Arena, Worker

PROMPT_TOKENS = 1500
NUM_OUTPUT = 120
GRPC, SHM = "grpc", "shm"
PREFILL = Role.PREFILL.value
_SOME_BLOCKS = {GRPC: 100_000, SHM: 4_000}
"""Bytes from a prefill to a decode worker that are more than an offer: blocks, or where they lie, are on their way."""


@dataclass(slots=True)
class Scene:
    """What a fault strikes. ``p`` and ``d`` are the workers that have the request."""

    arena: Arena
    p: Worker
    d: Worker
    prompt: list[int]
    frozen: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """For the table."""

    def worker(self, side: str) -> Worker:
        return self.p if side == "P" else self.d


class At:
    """Nothing is held up; the stage is known by the tokens that the client has."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def prepare(self, arena: Arena) -> None:
        """Before the request is sent."""

    async def reached(self, arena: Arena, answer: Answer) -> None:
        await answer.has(self._num_tokens)

    def is_on(self, answer: Answer) -> bool:
        """Whether the stage is not over already: a worker may have been quicker than its observer."""
        return self._num_tokens <= len(answer.tokens) < NUM_OUTPUT

    def leave(self, scene: Scene) -> None:
        """After the fault: what was held up for the stage's sake goes on."""


class Queued(At):
    """Prefill workers are stopped, and one of them has been sent the prompt."""

    def prepare(self, arena: Arena) -> None:
        for worker in arena.of(Role.PREFILL):
            arena.freeze(worker)

    async def reached(self, arena: Arena, answer: Answer) -> None:
        for role in (Role.PREFILL, Role.DECODE):
            await arena.seen(role, ROUTER, lambda weather: weather.num_sent >= PROMPT_TOKENS)

    def leave(self, scene: Scene) -> None:
        for worker in scene.arena.of(Role.PREFILL):
            if worker.name not in scene.frozen:
                scene.arena.wake(worker)


class HandingOver(At):
    """What a prefill worker sends to a decode worker stops after so many bytes, by transport."""

    def __init__(self, num_bytes: Mapping[str, int], num_tokens: int = 0) -> None:
        super().__init__(num_tokens)
        self._num_bytes = num_bytes

    def prepare(self, arena: Arena) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(PREFILL, pass_bytes=self._num_bytes[arena.transport])

    async def reached(self, arena: Arena, answer: Answer) -> None:
        await arena.seen(Role.DECODE, PREFILL, lambda weather: weather.num_stalls > 0)
        await super().reached(arena, answer)

    def is_on(self, answer: Answer) -> bool:
        return len(answer.tokens) == self._num_tokens

    def leave(self, scene: Scene) -> None:
        for worker in scene.arena.of(Role.DECODE):
            worker.proxy.set(PREFILL, pass_bytes=float("inf"))


STAGES: dict[Stage, At] = {
    Stage.QUEUED: Queued(0),
    Stage.PREFILLING: HandingOver({GRPC: 0, SHM: 0}),
    Stage.STREAMING: HandingOver(_SOME_BLOCKS),
    Stage.SEALED: HandingOver(_SOME_BLOCKS, num_tokens=1),
    Stage.DECODING: At(4),
}
