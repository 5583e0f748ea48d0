"""One row of the fault matrix: a request is brought to a stage, a fault strikes, and all must be well again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from proto.control import Role
from proto.lifecycle import Stage
from tests.support.answer import Answer
from tests.support.arena import Arena
from tests.support.fault_rows import LET_GO_S, Outcome, Row
from tests.support.fault_stages import STAGES, At, Scene
from tests.support.faults import FAULTS

MOST_ATTEMPTS = 10
NUM_REPEATED = 8
_REACHED_S = 30.0
_RECORDED_S = 5.0
"""How long the ledger may be behind."""


@dataclass(frozen=True)
class Question:
    """What a row's client asks, and the tokens that it gets of an engine that nobody disturbs."""

    prompt: list[int]
    params: Mapping[str, object]
    expected: list[int]


@dataclass
class Request:
    """One that is in a row's stage, and how things stood before it."""

    salt: str
    stage: At
    answer: Answer
    asking: asyncio.Task[None]
    scene: Scene
    pids: dict[str, int]
    recoveries: Counter[str]
    num_computed: dict[str, int]
    """Prompt tokens computed so far, by worker."""


async def play(row: Row, arena: Arena, question: Question, outcome: Outcome) -> None:
    """Fills ``outcome``. Raises AssertionError, or TimeoutError, where the row does not hold."""
    request = await bring_to(row, arena, question)
    try:
        await _strike(row, request, question, outcome)
    finally:
        await request.stage.leave(arena)


async def _strike(row: Row, request: Request, question: Question, outcome: Outcome) -> None:
    fault, scene, answer = FAULTS[row.fault], request.scene, request.answer
    arena = scene.arena
    moment = time.monotonic()
    await fault.strike(scene)
    await request.stage.leave(arena, scene.frozen)
    await fault.outlast(scene)
    async with asyncio.timeout(fault.within_s):
        await request.asking
    if fault.kills_router:
        assert answer.error is not None
        scene.notes.append("its connections end; everything it held is freed")
    else:
        assert answer.error is None, answer.error
        assert answer.tokens == question.expected, f"not the tokens that were expected: {answer.tokens}"
        outcome.pause_s = answer.pause_after(moment)
        remedies = await arena.recoveries() - request.recoveries
        steps = ", ".join(f"{remedy} × {count}" for remedy, count in remedies.items())
        scene.notes.append(steps or "goes on")
        if row.is_computed_once or (row.may_be_computed_once and remedies.keys() == {"redirect"}):
            await assert_computed_once(request)
    if fault.is_shortage:
        await assert_repeats(arena, question, fault.within_s, cache_salt=f"{request.salt}, meanwhile")
    await fault.undo(scene)
    arena.fair_weather()
    await arena.let_go(request.pids, LET_GO_S)
    await arena.ready()
    await arena.settled()
    outcome.whole_s = time.monotonic() - moment
    await assert_repeats(arena, question, fault.within_s, cache_salt=request.salt)
    await arena.settled()
    fault.verify(scene)
    assert await arena.transports_used() == {row.transport}
    outcome.what = "; ".join(scene.notes)


async def assert_computed_once(request: Request) -> None:
    """D is lost before it has adopted: the other one is served from the blocks that P has."""
    scene, arena = request.scene, request.scene.arena
    others = [worker for worker in arena.of(Role.DECODE) if worker is not scene.d]
    for tier, num_tokens in ((arena.of(Role.PREFILL), len(scene.prompt)), (others, 0)):
        before = sum(request.num_computed[worker.name] for worker in tier)
        assert await arena.computed(tier) - before == num_tokens
    scene.notes.append("computed once")


async def assert_repeats(arena: Arena, question: Question, within_s: float, *, cache_salt: str) -> None:
    """The same prompt is answered again, from whatever is cached under ``cache_salt``, and alike."""
    again = Answer()
    async with asyncio.timeout(within_s):
        params = {**question.params, "max_tokens": NUM_REPEATED}
        await arena.ask(question.prompt, again, cache_salt=cache_salt, **params)
    assert (again.tokens, again.error) == (question.expected[:NUM_REPEATED], None)


async def bring_to(row: Row, arena: Arena, question: Question) -> Request:
    """One that was through the row's stage before it was seen there is let go, and another sent."""
    for attempt in range(MOST_ATTEMPTS):
        await arena.ready()
        arena.fair_weather()
        stage = STAGES[row.stage]()
        try:
            request = await _send(row, stage, arena, question, f"{row} {attempt}")
        except BaseException:
            await stage.leave(arena)
            raise
        if isinstance(request, Request):
            return request
        await stage.leave(arena)
        await make_peace(arena)
        await request
        await arena.settled()
    raise AssertionError(f"{MOST_ATTEMPTS} requests were through {row.stage.value} before they were seen there")


async def _send(row: Row, stage: At, arena: Arena, question: Question, salt: str) -> Request | asyncio.Task[None]:
    """A request in its stage; or one that is past it, which will end by itself."""
    recoveries = await arena.recoveries()
    pids = {worker.name: worker.pid for worker in arena.workers}
    num_computed = {worker.name: await arena.computed([worker]) for worker in arena.workers}
    await stage.prepare(arena, question.prompt)
    answer = Answer()
    asking = asyncio.create_task(stage.ask(arena, question.prompt, answer, cache_salt=salt, **question.params))
    async with asyncio.timeout(_REACHED_S):
        await stage.reached(arena, answer)
    scene = await _scene(row.stage, stage, arena, question.prompt, answer)
    if scene is None:
        return asking
    return Request(salt, stage, answer, asking, scene, pids, recoveries, num_computed)


async def _scene(named: Stage, stage: At, arena: Arena, prompt: list[int], answer: Answer) -> Scene | None:
    """The workers that have the request, by the ledger, which must know it to be in that very stage. None: it is past
    it. What only the router has is nobody's, and not on the ledger."""
    if named is Stage.RECEIVED:
        assert await arena.has_closed_handoffs()
        return Scene(arena, arena.of(Role.PREFILL)[0], arena.of(Role.DECODE)[0], prompt)
    record = None
    deadline = time.monotonic() + _RECORDED_S
    while record is None and stage.is_on(answer) and time.monotonic() < deadline:
        record = await arena.handoff_at(named)
    if record is None or not stage.is_on(answer):
        return None
    p, d = [await arena.worker_of(epoch) for epoch in (record.prefill_epoch, record.decode_epoch)]
    return Scene(arena, p, d, prompt) if stage.is_on(answer) else None


async def make_peace(arena: Arena) -> None:
    """Whatever became of the last row, the next one starts well."""
    await arena.relieve()
    await arena.ready()
