"""Chaos in parts: what is asked and done follows from the seed, verdicts are right, and the sums are what happened."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import islice

import pytest
from aiohttp import web

from bench.chaos.answers import Answer, Said, Transcript, Verdict, judge
from bench.chaos.faults import Fault, FaultKind, schedule
from bench.chaos.questions import Ask, Question, ask_forever, ask_once, make_questions
from bench.chaos.report import Finding, Report
from bench.chaos.run import run
from bench.chaos.settings import ChaosSettings
from bench.chaos.storm import Done, Storm
from proto.errors import NoWorker

SETTINGS = ChaosSettings(seed=3, num_questions=30)
VOCABULARY = range(300)
GREEDY = Question(0, (1, 2), {"temperature": 0.0, "max_tokens": 3})
ASK = Ask(GREEDY, True, "")


def said(*tokens: int, finish: str | None = "length") -> Said:
    return Said(tokens, "x" * len(tokens), finish)


def answer(*choices: Said, error: str | None = None, ask: Ask = ASK, token_s: tuple[float, ...] = ()) -> Answer:
    return Answer(ask, 10.0, 11.0, choices, token_s, error)


# What is asked, and what is done.


def test_questions_faults_and_their_order_follow_from_the_seed() -> None:
    other = dataclasses.replace(SETTINGS, seed=4)
    questions = make_questions(SETTINGS, VOCABULARY)
    assert questions == make_questions(SETTINGS, VOCABULARY) != make_questions(other, VOCABULARY)
    asks = list(islice(ask_forever(SETTINGS, questions), 100))
    assert asks == list(islice(ask_forever(SETTINGS, questions), 100))
    faults = list(islice(schedule(SETTINGS), 200))
    assert faults == list(islice(schedule(SETTINGS), 200)) != list(islice(schedule(other), 200))
    assert {fault.kind for fault in faults} == set(FaultKind)
    assert sum(fault.after_s for fault in faults) / 200 == pytest.approx(SETTINGS.fault_every_s, rel=0.2)


def test_the_load_is_mixed() -> None:
    questions = make_questions(SETTINGS, VOCABULARY)
    assert {question.kind for question in questions} == {"greedy", "seeded"}
    lengths = [len(question.prompt) for question in questions]
    assert min(lengths) < 65 < 200 < max(lengths)
    assert all("seed" in question.params for question in questions if question.params["temperature"])
    assert [ask.question for ask in ask_once(SETTINGS, questions)] == questions
    asks = list(islice(ask_forever(SETTINGS, questions), 60))
    assert {ask.stream for ask in asks} == {True, False}
    assert {ask.question.number for ask in asks[:30]} == {question.number for question in questions}
    salts = [ask.salt for ask in asks if ask.salt]
    assert len(set(salts)) == len(salts) > 10
    assert "cache_salt" not in ASK.body("m")


# Verdicts.


@pytest.mark.parametrize(
    ("given", "verdict", "why"),
    [
        (answer(said(1, 2)), Verdict.RIGHT, ""),
        (answer(said(1, 3)), Verdict.WRONG, "token 1 is 3 instead of 2"),
        (answer(said(1)), Verdict.WRONG, "1 tokens instead of 2"),
        (answer(said(1, 2, 2)), Verdict.WRONG, "3 tokens instead of 2"),
        (answer(said(1, 2, finish="stop")), Verdict.WRONG, "stop"),
        (answer(said(1, 2), said(1, 2)), Verdict.WRONG, "2 choices instead of 1"),
        (answer(said(1, 2), error="503: gone"), Verdict.LOST, "503: gone"),
    ],
)
def test_an_answer_is_compared_with_the_reference(given: Answer, verdict: Verdict, why: str) -> None:
    found, reason = judge(given, answer(said(1, 2)))
    assert found is verdict
    assert why in reason


def event(*tokens: int, index: int = 0, finish: str | None = None) -> dict[str, object]:
    choice = {"index": index, "text": "x" * len(tokens), "token_ids": list(tokens), "finish_reason": finish}
    return {"choices": [choice]}


def test_a_stream_is_put_together_by_choice() -> None:
    two = Ask(dataclasses.replace(GREEDY, params={**GREEDY.params, "n": 2}), True, "")
    transcript = Transcript(two, 1.0)
    for at, piece in enumerate(
        [event(1), event(5, index=1), event(2, finish="length"), event(6, index=1, finish="stop")]
    ):
        transcript.body(piece, 2.0 + at)  # type: ignore[arg-type]
    got = transcript.answer(9.0)
    assert got.error is None
    assert got.choices == (Said((1, 2), "xx", "length"), Said((5, 6), "xx", "stop"))
    assert got.token_s == ()


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([event(1)], "0 of 1"),
        ([event(1, finish="length"), event(finish="length")], "ended twice"),
        ([event(1), {"error": {"message": "no worker is left"}}], "no worker is left"),
    ],
)
def test_a_stream_that_does_not_end_well_is_lost(events: list[object], error: str) -> None:
    transcript = Transcript(ASK, 1.0)
    for piece in events:
        transcript.body(piece, 2.0)  # type: ignore[arg-type]
    assert error in (transcript.answer(3.0).error or "")


# The storm.


class FakeNetwork:
    """Notes what is done to it."""

    def __init__(self, done: list[str]) -> None:
        self._done = done
        self.num_flipped = 0
        self.is_mended = asyncio.Event()

    def cut(self, client: str, name: str) -> None:
        self._done.append(f"cut {client} {name}")

    def silence(self, client: str, name: str) -> None:
        self._done.append(f"silence {client} {name}")

    def slow(self, client: str, name: str) -> None:
        self._done.append(f"slow {client} {name}")

    def mend(self, client: str, name: str) -> None:
        self._done.append(f"mend {client} {name}")
        self.is_mended.set()

    def flip(self, client: str, name: str, num_flips: int) -> None:
        self._done.append(f"flip {client} {name} {num_flips}")
        self.num_flipped += num_flips


class FakeStack:
    """Notes what is done to it. Two workers of each tier."""

    def __init__(self, url: str = "") -> None:
        self.base_url = url
        self.done: list[str] = []
        self.network = FakeNetwork(self.done)
        self.whole = asyncio.Event()
        self.whole.set()
        self.left: dict[str, int] = {}
        self.asked = asyncio.Event()

    def members(self, tier: str) -> Sequence[str]:
        return [tier] if tier in ("redis", "router") else [f"{tier}-0", f"{tier}-1"]

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")

    def restart(self, name: str) -> None:
        self.done.append(f"restart {name}")

    def stop(self, name: str) -> None:
        self.done.append(f"stop {name}")

    def go_on(self, name: str) -> None:
        self.done.append(f"go on {name}")

    async def flush(self) -> None:
        self.done.append("flush")

    async def is_whole(self, tier: str = "") -> bool:
        self.asked.set()
        return self.whole.is_set()

    async def leftovers(self) -> Mapping[str, int]:
        return self.left


def fault(kind: FaultKind, number: int = 0, for_s: float = 0.0) -> Fault:
    return Fault(0.0, kind, number, for_s, num_flips=3)


async def test_faults_do_what_they_say() -> None:
    stack, notes = FakeStack(), []
    storm = Storm(stack, notes.append)
    await storm.run([fault(FaultKind.KILL_PREFILL, 1), fault(FaultKind.RESTART_DECODE), fault(FaultKind.FLUSH_REDIS)])
    assert stack.done == ["kill prefill-1", "restart decode-0", "flush"]
    assert notes == ["kill prefill-1", "restart decode-0", "flush redis"]


async def test_what_is_stopped_is_not_harmed_again_and_goes_on_in_the_end() -> None:
    stack = FakeStack()
    storm = Storm(stack, lambda text: None)
    await storm.run([fault(FaultKind.STOP_PREFILL, 0, 600.0), fault(FaultKind.KILL_PREFILL, 0)])
    assert stack.done == ["stop prefill-0", "kill prefill-1"]
    await storm.calm()
    await storm.calm()
    assert stack.done == ["stop prefill-0", "kill prefill-1", "go on prefill-0"]


@pytest.mark.parametrize(
    ("kind", "begun", "ended"),
    [
        (FaultKind.CUT_ROUTER_PREFILL, "cut router prefill-1", "mend router prefill-1"),
        (FaultKind.SILENCE_PREFILL_DECODE, "silence prefill decode-1", "mend prefill decode-1"),
        (FaultKind.SLOW_ROUTER_DECODE, "slow router decode-1", "mend router decode-1"),
    ],
)
async def test_the_network_is_mended_when_its_time_is_over(kind: FaultKind, begun: str, ended: str) -> None:
    stack = FakeStack()
    await Storm(stack, lambda text: None).run([fault(kind, 1)])
    assert stack.done == [begun]
    await stack.network.is_mended.wait()
    assert stack.done == [begun, ended]


async def test_a_storm_that_calms_mends_all_and_flips_no_more() -> None:
    stack, notes = FakeStack(), []
    storm = Storm(stack, notes.append)
    await storm.run([fault(FaultKind.FLIP, 1), fault(FaultKind.CUT_ROUTER_DECODE, 0, 600.0)])
    await storm.calm()
    assert stack.done == [
        "flip prefill decode-1 3",
        "cut router decode-0",
        "mend router decode-0",
        "flip prefill decode-1 0",
    ]
    assert notes == ["flip prefill-decode-1 × 3", "cut router-decode-0 for 600.0 s"]


@pytest.mark.parametrize("kind", [FaultKind.SILENCE_ROUTER_DECODE, FaultKind.CUT_PREFILL_DECODE])
async def test_a_decode_worker_that_cannot_be_reached_is_harmed_until_it_can(kind: FaultKind) -> None:
    """Whatever the router believes: it has not noticed, or does not use that way itself."""
    stack = FakeStack()
    faults = [fault(kind, 0, 0.3), fault(FaultKind.FLIP, 1), fault(FaultKind.KILL_DECODE, 1)]
    await Storm(stack, lambda text: None).run(faults)
    begun, flipped, ended, killed = stack.done
    assert begun.split()[-1] == "decode-0"
    assert flipped == "flip prefill decode-1 3"
    assert ended.startswith("mend")
    assert killed == "kill decode-1"


async def test_one_decode_worker_is_always_left() -> None:
    stack = FakeStack()
    stack.whole.clear()
    running = asyncio.create_task(
        Storm(stack, lambda text: None).run([fault(FaultKind.KILL_REDIS), fault(FaultKind.KILL_DECODE)])
    )
    await stack.asked.wait()
    assert stack.done == ["kill redis"]
    stack.whole.set()
    await running
    assert stack.done == ["kill redis", "kill decode-0"]


# A whole run against a server that answers by script.


class Server:
    """Answers with the prompt's length, over and over; from the ``spoil_after``-th answer on, something else."""

    def __init__(self, spoil_after: int, status: int) -> None:
        self._spoil_after = spoil_after
        self._status = status
        self._num_asked = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._num_asked += 1
        is_spoilt = self._num_asked > self._spoil_after
        if is_spoilt and self._status != 200:
            return web.json_response({"error": {"message": "no worker is left"}}, status=self._status)
        tokens = [len(body["prompt"]) + is_spoilt] * body["max_tokens"]
        choices = [
            {"index": index, "text": "", "token_ids": tokens, "finish_reason": "length"}
            for index in range(body.get("n", 1))
        ]
        if not body["stream"]:
            return web.json_response({"choices": choices})
        lines = f"data: {json.dumps({'choices': choices})}\n\ndata: [DONE]\n\n"
        return web.Response(text=lines, content_type="text/event-stream")


async def run_against(
    stack: FakeStack, *, spoil_after: int = 1 << 30, status: int = 200, settle_s: float = 5.0
) -> Report:
    server, app = Server(spoil_after, status), web.Application()
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_get("/v1/models", _list_models)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stack.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        settings = ChaosSettings(num_questions=6, storm_s=0.4, fault_every_s=0.02, concurrency=2, settle_s=settle_s)
        return await run(settings, stack, lambda text: None)
    finally:
        await runner.cleanup()


async def _list_models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "scripted"}]})


async def test_a_run_that_finds_nothing() -> None:
    stack = FakeStack()
    report = await run_against(stack)
    assert report.is_clean
    assert report.num_flipped == stack.network.num_flipped
    assert len(report.calm) == 6
    assert report.answers
    assert report.faults
    assert "wrong answers     0" in report.text()
    assert "nothing, 0.0 s" in report.text()


async def test_wrong_and_lost_answers_are_found_with_the_faults_they_lived_through() -> None:
    wrong = await run_against(FakeStack(), spoil_after=8)
    assert wrong.count(Verdict.WRONG) == len(wrong.answers) - 2
    assert not wrong.is_clean
    lost = await run_against(FakeStack(), spoil_after=8, status=503)
    assert lost.count(Verdict.LOST) == len(lost.answers) - 2
    assert any(finding.faults for finding in lost.findings)
    assert "503: no worker is left" in lost.findings[0].describe(0)


async def test_what_is_left_behind_is_found() -> None:
    stack = FakeStack()
    stack.left = {"blocks of decode-1": 7}
    report = await run_against(stack, settle_s=0.0)
    assert not report.is_clean
    assert "blocks of decode-1: 7" in report.text()


async def test_a_server_that_fails_in_peace_is_not_harmed() -> None:
    stack = FakeStack()
    with pytest.raises(NoWorker, match="without any fault"):
        await run_against(stack, spoil_after=2, status=503)
    assert not stack.done


def test_figures_are_of_complete_streams() -> None:
    good, cut = answer(said(1, 2), token_s=(10.1, 10.3)), answer(error="cut", token_s=(10.5,))
    done = Done(fault(FaultKind.KILL_DECODE), "decode-0", 10.2)
    finding = Finding(cut, Verdict.LOST, "cut", (done.describe(),))
    flip = Done(fault(FaultKind.FLIP), "decode-1", 10.3)
    text = Report(SETTINGS, (good,), (good, cut), (done, flip, flip), 5, (finding,), {}, 0.0).text()
    assert "TTFT                    100.0      100.0       100.0      100.0" in text
    assert "ITL                     200.0      200.0       200.0      200.0" in text
    assert "lost answers      1" in text
    assert "faults            3\n  kill            decode 1\n  flip            prefill-decode 2\n" in text
    assert "bits flipped      5" in text
    assert "kill decode-0" in finding.describe(3)
