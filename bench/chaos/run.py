"""One run: every question once in peace, then again and again in the storm, then what is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from bench.chaos.answers import Answer, Verdict, judge
from bench.chaos.client import Client, connect
from bench.chaos.faults import Stack, schedule
from bench.chaos.questions import Ask, ask_forever, ask_once, make_questions
from bench.chaos.report import Finding, Report
from bench.chaos.settings import ChaosSettings
from bench.chaos.storm import Done, Storm
from bench.client import connect as probe
from bench.settings import Target
from bench.vocabulary import PROBE, ids_of_probe
from proto.errors import NoWorker

_LOOK_EVERY_S = 0.2

Note = Callable[[str], object]


async def run(settings: ChaosSettings, stack: Stack, note: Note) -> Report:
    """Raises NoWorker where the stack cannot even answer in peace."""
    async with probe(Target(stack.base_url)) as server:
        model = await server.find_model()
        tokens = ids_of_probe(await server.tokenize(model, PROBE)).tokens
    questions = make_questions(settings, tokens)
    async with connect(stack.base_url, model, settings.request_timeout_s) as client:
        note(f"{len(questions)} questions are asked without faults")
        calm = await _ask_all(client, iter(ask_once(settings, questions)), settings.concurrency)
        for answer in calm:
            if answer.error is not None:
                raise NoWorker(f"question {answer.ask.question.number} failed without any fault: {answer.error}")
        references = {answer.ask.question.number: answer for answer in calm}
        note(f"and now with faults, for {settings.storm_s:g} s")
        return await _through_the_storm(settings, stack, client, references, ask_forever(settings, questions), note)


async def _through_the_storm(
    settings: ChaosSettings,
    stack: Stack,
    client: Client,
    references: dict[int, Answer],
    asks: Iterator[Ask],
    note: Note,
) -> Report:
    storm = Storm(stack, note)
    raging = asyncio.create_task(storm.run(schedule(settings)))
    findings: list[Finding] = []

    def judged(answer: Answer) -> None:
        verdict, why = judge(answer, references[answer.ask.question.number])
        if verdict is not Verdict.RIGHT:
            findings.append(Finding(answer, verdict, why, _during(storm.done, answer)))
            note(findings[-1].describe(settings.seed))

    try:
        until = time.monotonic() + settings.storm_s
        answers = await _ask_all(client, asks, settings.concurrency, until=until, heard=judged)
    finally:
        raging.cancel()
        await asyncio.wait([raging])
        await storm.calm()
    if not raging.cancelled():
        raging.result()
    settled_s, left = await _settle(stack, settings.settle_s)
    return Report(
        settings=settings,
        calm=tuple(references.values()),
        answers=tuple(answers),
        faults=tuple(storm.done),
        num_flipped=stack.network.num_flipped,
        findings=tuple(findings),
        left=left,
        settled_s=settled_s,
    )


async def _ask_all(
    client: Client,
    asks: Iterator[Ask],
    concurrency: int,
    *,
    until: float | None = None,
    heard: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """``concurrency`` clients, each with its next question once its last is answered; all end after ``until``."""
    answers: list[Answer] = []

    async def one() -> None:
        while until is None or time.monotonic() < until:
            if (ask := next(asks, None)) is None:
                return
            answer = await client.ask(ask)
            answers.append(answer)
            heard(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())
    return answers


def _during(faults: Sequence[Done], answer: Answer) -> tuple[str, ...]:
    """The faults of an answer's lifetime, and the last two before it."""
    before = [done for done in faults if done.at_s < answer.sent_s][-2:]
    during = [done for done in faults if answer.sent_s <= done.at_s <= answer.ended_s]
    return tuple(f"{done.describe()} at {done.at_s - answer.sent_s:+.2f} s" for done in [*before, *during])


async def _settle(stack: Stack, patience_s: float) -> tuple[float, dict[str, int]]:
    """Seconds until the stack was whole and held nothing, and what it still holds when its time is over."""
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        left = dict(await stack.leftovers()) if await stack.is_whole() else {"the stack is not whole": 1}
        if not left or waited > patience_s:
            return waited, left
        await asyncio.sleep(_LOOK_EVERY_S)
