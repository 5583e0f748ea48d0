"""The rows of the fault matrix: how each stage is reached and held, what each fault does, and the table of outcomes."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from redis.asyncio import Redis

from proto.control import Role
from proto.lifecycle import Stage
from tests.support.arena import ROUTER, Answer, Arena, Worker

PROMPT_TOKENS = 1500
NUM_OUTPUT = 120
QUICK_S = 20.0
SLOW_S = 60.0
"""Silence is noticed by the keepalive of the connections, or by a stage's deadline."""
_PAYLOAD = 100_000
"""Bytes from a prefill to a decode worker that are more than an offer: blocks are on their way."""
PREFILL = Role.PREFILL.value
TABLE = Path(__file__).parents[2] / "docs" / "faults.md"


@dataclass(frozen=True, slots=True)
class Row:
    stage: Stage
    fault: str

    def __str__(self) -> str:
        return f"{self.stage.value}, {self.fault}"


@dataclass(slots=True)
class Outcome:
    row: Row
    holds: bool = False
    what: str = ""
    pause_s: float | None = None
    """The client's longest wait for a token, from the fault on."""
    whole_s: float | None = None
    """Until every worker is back, the ledger is closed and every block is given back."""


@dataclass(slots=True)
class Scene:
    """``p`` and ``d`` are the workers that have the request."""

    arena: Arena
    p: Worker
    d: Worker
    frozen: set[str] = field(default_factory=set)
    flips: int = 0


# Stages.


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
    """What a prefill worker sends to a decode worker stops after ``num_bytes``."""

    def __init__(self, num_bytes: int, num_tokens: int = 0) -> None:
        super().__init__(num_tokens)
        self._num_bytes = num_bytes

    def prepare(self, arena: Arena) -> None:
        for worker in arena.of(Role.DECODE):
            worker.proxy.set(PREFILL, pass_bytes=self._num_bytes)

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
    Stage.PREFILLING: HandingOver(0),
    Stage.STREAMING: HandingOver(_PAYLOAD),
    Stage.SEALED: HandingOver(_PAYLOAD, num_tokens=1),
    Stage.DECODING: At(4),
}


# Faults.


class Fault:
    within_s = QUICK_S
    kills_router = False

    async def strike(self, scene: Scene) -> None: ...

    async def undo(self, scene: Scene) -> None: ...

    def verify(self, scene: Scene) -> None: ...


class Kill(Fault):
    def __init__(self, sides: str) -> None:
        self._sides = sides

    async def strike(self, scene: Scene) -> None:
        for side in self._sides:
            scene.arena.kill(scene.p if side == "P" else scene.d)


class Freeze(Fault):
    """SIGSTOP; once the client has everything, SIGCONT: it wakes up and believes that it owns its blocks."""

    within_s = SLOW_S

    def __init__(self, side: str) -> None:
        self._side = side

    def _victim(self, scene: Scene) -> Worker:
        return scene.p if self._side == "P" else scene.d

    async def strike(self, scene: Scene) -> None:
        scene.frozen.add(self._victim(scene).name)
        scene.arena.freeze(self._victim(scene))

    async def undo(self, scene: Scene) -> None:
        scene.arena.wake(self._victim(scene))


class Network(Fault):
    """The way from one kind of client to the request's worker of one tier."""

    def __init__(self, client: str, server: str, within_s: float = QUICK_S, **weather: float | bool) -> None:
        self._client, self._server, self.within_s, self._weather = client, server, within_s, weather

    async def strike(self, scene: Scene) -> None:
        worker = scene.p if self._server == "P" else scene.d
        worker.proxy.set(self._client, **self._weather)


class Flip(Fault):
    """One bit in each of the next payload frames."""

    async def strike(self, scene: Scene) -> None:
        self._weather = scene.d.proxy.weather(PREFILL)
        scene.d.proxy.set(PREFILL, num_flips=3)

    async def undo(self, scene: Scene) -> None:
        scene.flips = self._weather.num_flipped

    def verify(self, scene: Scene) -> None:
        assert scene.flips > 0, "no bit was flipped"


class RedisDies(Fault):
    async def strike(self, scene: Scene) -> None:
        await scene.arena.redis.kill()

    async def undo(self, scene: Scene) -> None:
        await scene.arena.redis.start()


class RedisFlushed(Fault):
    async def strike(self, scene: Scene) -> None:
        async with Redis.from_url(scene.arena.redis.url) as redis:
            await redis.flushall()


class RedisFrozen(Fault):
    async def strike(self, scene: Scene) -> None:
        assert scene.arena.redis.pid is not None
        os.kill(scene.arena.redis.pid, signal.SIGSTOP)

    async def undo(self, scene: Scene) -> None:
        assert scene.arena.redis.pid is not None
        os.kill(scene.arena.redis.pid, signal.SIGCONT)


class RouterDies(Fault):
    kills_router = True

    async def strike(self, scene: Scene) -> None:
        pid = scene.arena.router.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "P killed": Kill("P"),
    "D killed": Kill("D"),
    "P and D killed": Kill("PD"),
    "P stopped, wakes up later": Freeze("P"),
    "D stopped, wakes up later": Freeze("D"),
    "P-D cut": Network(PREFILL, "D", is_cut=True),
    "P-D silent": Network(PREFILL, "D", SLOW_S, is_silent=True),
    "P-D slow": Network(PREFILL, "D", SLOW_S, delay_s=0.02),
    "router-P cut": Network(ROUTER, "P", is_cut=True),
    "router-D cut": Network(ROUTER, "D", is_cut=True),
    "router-P silent": Network(ROUTER, "P", SLOW_S, is_silent=True),
    "router-D silent": Network(ROUTER, "D", SLOW_S, is_silent=True),
    "payload bits flipped": Flip(),
    "Redis killed, back empty": RedisDies(),
    "Redis flushed": RedisFlushed(),
    "Redis stopped": RedisFrozen(),
    "router killed": RouterDies(),
}
_ALREADY_HANDED_OVER = {"P-D cut", "P-D silent", "P-D slow", "payload bits flipped"}
"""Between P and D nothing is on its way any more while D decodes."""
_SAMPLE = {
    Row(Stage.STREAMING, "payload bits flipped"),
    Row(Stage.SEALED, "D killed"),
    Row(Stage.DECODING, "D killed"),
}


def rows(*, only_sample: bool) -> list[Row]:
    every = [
        Row(stage, fault)
        for stage in STAGES
        for fault in FAULTS
        if not (stage is Stage.DECODING and fault in _ALREADY_HANDED_OVER)
    ]
    return [row for row in every if row in _SAMPLE] if only_sample else every


def write_table(outcomes: Sequence[Outcome], path: Path = TABLE) -> None:
    """Written anew after each row. Rows that were not run keep what their last run found; never run ones are absent."""
    found = _read_table(path) | {outcome.row: _line(outcome) for outcome in outcomes}
    lines = [found[row] for row in rows(only_sample=False) if row in found]
    head = _HEAD.format(num=len(lines), machine=f"{os.cpu_count()} cores, {platform.system()}")
    path.write_text("\n".join([head, *lines]) + "\n")


def _read_table(path: Path) -> dict[Row, str]:
    known = {(row.stage.value, row.fault): row for row in rows(only_sample=False)}
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        cells = tuple(cell.strip() for cell in line.split("|")[1:3])
        if cells in known:
            found[known[cells]] = line  # type: ignore[index]
    return found


def _line(outcome: Outcome) -> str:
    row, within_s = outcome.row, FAULTS[outcome.row.fault].within_s
    verdict = outcome.what if outcome.holds else f"**does not hold**: {outcome.what}"
    pause, whole = (_seconds(each) for each in (outcome.pause_s, outcome.whole_s))
    return f"| {row.stage.value} | {row.fault} | {verdict} | {pause} | {within_s:.0f} s | {whole} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


_HEAD = """\
# What a client sees when something dies

{num} rows, each as its last run found it; `make faults` runs them all and writes this page
(`tests/faults/test_matrix.py`). On {machine}, shared with other work: times are what was seen, not a promise; the bound
is.

Two prefill workers (P), two decode workers (D), the router and Redis are processes; a proxy stands in front of each
worker. Payloads travel over gRPC; the model is float32 with random weights; the prompt has 1,500 tokens, the answer
120, sampled from a seed with a frequency penalty. A row holds if the client's tokens are those of an engine that nobody
disturbs, no error comes, the client has its answer within the bound, and afterwards every worker serves, the ledger
has no open hand-off and every block is free or cached. (A router's death ends its clients' connections: there the rest
must hold.) A row that does not hold says so.

How a stage is reached: *queued*: the prefill worker is stopped with the prompt in its socket; *prefilling*: the offer
is held up on its way to D; *streaming*: 100 KB of blocks have passed, the rest is held up; *sealed*: likewise, and the
client has the first token; *decoding*: the client has four tokens. The outcome names the router's steps. The pause is
the client's longest wait for a token from the fault on. All is well when nothing of the request or the fault is left:
what a dead router held goes with its lease of 30 s.

| stage | fault | outcome | pause | bound | all well after |
|---|---|---|---|---|---|"""
