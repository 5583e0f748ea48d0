"""How each stage of a request is reached, and held until the fault has struck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proto.control import Role
from proto.lifecycle import TERMINAL, Stage
from tandem.local import StackSettings
from tests.support.answer import Answer, Gate
from tests.support.arena import ROUTER, Arena, Worker
from tests.support.stack import stack_settings

PROMPT_TOKENS = 1500
MAX_LENGTH = 2048
NUM_BLOCKS = 200
"""Of each worker: room for two of the prompts, but not for one beside a longer one."""
MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": MAX_LENGTH,
}
"""Slow enough that a prompt can be seen on its way."""
_LONGER_BY = 500
GRPC, SHM = "grpc", "shm"
PREFILL = Role.PREFILL.value
_SOME_BLOCKS = {GRPC: 100_000, SHM: 4_000}
"""Bytes from a prefill to a decode worker that are more than an offer: blocks, or where they lie, are on their way."""


def fault_settings(checkpoint: Path, transport: str, *, dtype: str = "float32") -> StackSettings:
    """Two workers of each tier, and small chunks."""
    return stack_settings(
        checkpoint,
        prefill=2,
        decode=2,
        transports=(transport,),
        max_model_len=MAX_LENGTH,
        chunk=16,
        num_blocks=NUM_BLOCKS,
        dtype=dtype,
    )


@dataclass(slots=True)
class Scene:
    """What a fault strikes. ``p`` and ``d`` are the workers that have the request, or any where none has it yet."""

    arena: Arena
    p: Worker
    d: Worker
    prompt: list[int]
    frozen: set[str] = field(default_factory=set)
    """Names of the workers that stay stopped when the stage is left."""
    notes: list[str] = field(default_factory=list)
    """For the table."""

    def worker(self, side: str) -> Worker:
        return self.p if side == "P" else self.d


class At:
    """One request's stay in a stage. Here nothing is held up; the stage is known by the tokens that the client has."""

    def __init__(self, num_tokens: int = 0) -> None:
        self._num_tokens = num_tokens

    async def prepare(self, arena: Arena, prompt: list[int]) -> None:
        """Before the request is sent."""

    async def ask(self, arena: Arena, prompt: list[int], answer: Answer, **params: Any) -> None:
        await arena.ask(prompt, answer, **params)

    async def reached(self, arena: Arena, answer: Answer) -> None:
        await answer.has(self._num_tokens)

    def is_on(self, answer: Answer) -> bool:
        """Whether the stage is not over already: a worker may have been quicker than its observer."""
        return len(answer.tokens) >= self._num_tokens and answer.finish is None and answer.error is None

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        """After the fault: what was held up for the stage's sake goes on, but for what ``frozen`` names. May be called
        twice."""


class Received(At):
    """The router has half of the request's body."""

    def __init__(self) -> None:
        super().__init__()
        self._gate = Gate()

    async def ask(self, arena: Arena, prompt: list[int], answer: Answer, **params: Any) -> None:
        await arena.ask(prompt, answer, gate=self._gate, **params)

    async def reached(self, arena: Arena, answer: Answer) -> None:
        await self._gate.is_half_through.wait()
        await arena.router_metrics()  # it answers what came after that half

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        self._gate.open()


class Routed(At):
    """Prefill workers are stopped, and one of them has been sent the prompt."""

    async def prepare(self, arena: Arena, prompt: list[int]) -> None:
        for worker in arena.of(Role.PREFILL):
            arena.freeze(worker.child)

    async def reached(self, arena: Arena, answer: Answer) -> None:
        for role in (Role.PREFILL, Role.DECODE):
            await arena.seen(role, ROUTER, lambda weather: weather.num_sent >= PROMPT_TOKENS)

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        for worker in arena.of(Role.PREFILL):
            if worker.name not in frozen:
                arena.wake(worker.child)


class HandingOver(At):
    """What a prefill worker sends to a decode worker stops after so many bytes, by transport."""

    def __init__(self, num_bytes: Mapping[str, int], num_tokens: int = 0) -> None:
        super().__init__(num_tokens)
        self._num_bytes = num_bytes

    async def prepare(self, arena: Arena, prompt: list[int]) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(PREFILL, pass_bytes=self._num_bytes[arena.transport])

    async def reached(self, arena: Arena, answer: Answer) -> None:
        await arena.seen(Role.DECODE, PREFILL, lambda weather: weather.num_stalls > 0)
        await super().reached(arena, answer)

    def is_on(self, answer: Answer) -> bool:
        return len(answer.tokens) == self._num_tokens

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(PREFILL, pass_bytes=float("inf"))


class Queued(HandingOver):
    """Each prefill worker has its memory full of a longer prompt, which it cannot hand over, and whose client is gone
    when the stage is left."""

    def __init__(self) -> None:
        super().__init__({GRPC: 0, SHM: 0})
        self._others: list[asyncio.Task[None]] = []

    async def prepare(self, arena: Arena, prompt: list[int]) -> None:
        await super().prepare(arena, prompt)
        answers = [Answer() for _ in arena.of(Role.PREFILL)]
        for number, answer in enumerate(answers):
            longer, salt = [*prompt, *prompt[:_LONGER_BY]], f"ahead {number} {id(self)}"
            self._others.append(asyncio.create_task(arena.ask(longer, answer, cache_salt=salt, max_tokens=2)))
        async with asyncio.timeout(30):
            for answer in answers:
                await answer.has(1)
        assert not any(answer.error for answer in answers), answers

    async def reached(self, arena: Arena, answer: Answer) -> None:
        """The ledger says so."""

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        for other in self._others:
            other.cancel()
        await asyncio.gather(*self._others, return_exceptions=True)
        await super().leave(arena)


class Adopted(At):
    """Nothing that the router says reaches a decode worker: it has all blocks, and knows of no request."""

    def __init__(self) -> None:
        super().__init__(num_tokens=1)

    async def prepare(self, arena: Arena, prompt: list[int]) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(ROUTER, pass_bytes=0)

    def is_on(self, answer: Answer) -> bool:
        return len(answer.tokens) == 1

    async def leave(self, arena: Arena, frozen: Collection[str] = ()) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(ROUTER, pass_bytes=float("inf"))


STAGES: Mapping[Stage, Callable[[], At]] = {
    Stage.RECEIVED: Received,
    Stage.ROUTED: Routed,
    Stage.QUEUED: Queued,
    Stage.PREFILLING: lambda: HandingOver({GRPC: 0, SHM: 0}),
    Stage.STREAMING: lambda: HandingOver(_SOME_BLOCKS),
    Stage.SEALED: lambda: HandingOver(_SOME_BLOCKS, num_tokens=1),
    Stage.ADOPTED: Adopted,
    Stage.DECODING: lambda: At(4),
}
assert STAGES.keys() == set(Stage) - TERMINAL
