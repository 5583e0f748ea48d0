"""A canary per interval, only where there is a path, and a verdict that names the pair."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from proto.control import Load, RejectReason, Role
from proto.errors import LocalFault, NoWorker, Overloaded, TandemError, WorkerLost
from proto.ids import RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import FinishReason, SamplingParams, TokenOut
from router.canary import EXCUSE_S, NUM_TOKENS, Canary, Verdict
from router.contract import NewRequest
from router.policy import Candidate, View
from tests.support.fleet import BLOCK_SIZE, LAYOUT, House, candidate, read_all, token

RIGHT = [5, 6, 7, 8]
PAIR = (candidate("p1", Role.PREFILL), candidate("d1", Role.DECODE))


class Flight(AsyncIterator[list[TokenOut]]):
    """One canary's answer."""

    def __init__(self, tokens: list[int], error: TandemError | None, *, hangs: bool, num_bytes: int) -> None:
        self.id = RequestId("r.1")
        self.timings: dict[object, float] = {}
        self.num_cached, self.num_bytes_moved = 0, num_bytes
        self.prefill_worker, self.decode_worker = WorkerId("p1"), WorkerId("d1")
        self.num_closed = 0
        self.is_refused = False
        self._tokens, self._error, self._hangs = list(tokens), error, hangs

    async def __anext__(self) -> list[TokenOut]:
        if self._hangs:
            await asyncio.Event().wait()
        if not self._tokens:
            raise self._error or StopAsyncIteration
        position = NUM_TOKENS - len(self._tokens)
        finish = FinishReason.LENGTH if len(self._tokens) == 1 else None
        return [TokenOut(self.id, 0, position, self._tokens.pop(0), finish=finish)]

    def stop_choice(self, choice: int) -> None:
        raise AssertionError("a canary is not stopped")

    def fail(self, error: TandemError) -> None:
        raise AssertionError("a canary is alone")

    async def aclose(self) -> None:
        self.num_closed += 1


class Air:
    """A path that answers as told, and a fleet as told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.last_adopted_at = float("-inf")
        self.workers: tuple[Candidate, ...] = PAIR
        self.answer = RIGHT
        self.error: TandemError | None = None
        self.refuses: TandemError | None = None
        self.hangs = False
        self.is_full = False
        self.num_bytes = 10
        self.asked: list[NewRequest] = []
        self.flights: list[Flight] = []
        self.canary = Canary(self, self.view, lambda: 50, 10.0, lambda: self.now, timeout_s=0.01)

    def view(self) -> View:
        return View(workers=self.workers, layout=LAYOUT, block_size=BLOCK_SIZE)

    async def start_canary(self, new: NewRequest) -> Flight:
        self.asked.append(new)
        if self.refuses is not None:
            raise self.refuses
        self.flights.append(Flight(self.answer, self.error, hangs=self.hangs, num_bytes=self.num_bytes))
        self.flights[-1].is_refused = self.is_full
        return self.flights[-1]

    async def next_verdict(self) -> Verdict:
        """Asks when the last verdict is old, and again when the canary is back."""
        self.now += 10.0
        self.canary.verdict()
        async with asyncio.timeout(10):
            while self.canary._flight is not None:
                await asyncio.wait([self.canary._flight])
                await asyncio.sleep(0)
        verdict = self.canary.verdict()
        assert verdict is not None
        return verdict


@pytest.fixture
async def air() -> AsyncIterator[Air]:
    air = Air()
    yield air
    await air.canary.close()
    await air.canary.close()
    assert all(flight.num_closed == 1 for flight in air.flights)


async def test_the_first_is_awaited_and_then_one_flies_per_interval(air: Air) -> None:
    assert air.canary.verdict() is None
    assert air.canary.is_pending
    assert (await air.next_verdict()).trouble == ""
    assert not air.canary.is_pending
    for _ in range(5):
        air.canary.verdict()
    assert len(air.asked) == 1
    await air.next_verdict()
    assert len(air.asked) == 2


async def test_a_canary_is_small_usual_and_never_cached(air: Air) -> None:
    await air.next_verdict()
    await air.next_verdict()
    first, second = air.asked
    assert first.prompt == second.prompt
    assert len(first.prompt) == BLOCK_SIZE + 1
    assert first.cache_salt != second.cache_salt
    assert first.priority == 0, "behind a queue that never empties it would tell nothing"
    assert (first.params.max_tokens, first.params.temperature) == (NUM_TOKENS, 0.0)


@pytest.mark.parametrize("workers", [PAIR[:1], PAIR[1:], (), (candidate("p1", Role.PREFILL, is_usable=False), PAIR[1])])
async def test_without_a_pair_there_is_no_path_to_try(air: Air, workers: tuple[Candidate, ...]) -> None:
    air.workers = workers
    assert air.canary.verdict() is None
    assert not air.canary.is_pending
    assert not air.asked


async def test_a_real_hand_off_is_as_good(air: Air) -> None:
    air.last_adopted_at = 95.0
    assert air.canary.verdict() == Verdict("", 95.0)
    assert not air.asked
    air.now = 106.0
    air.canary.verdict()
    await asyncio.sleep(0)
    assert len(air.asked) == 1


def hang(air: Air) -> None:
    air.hangs = True


def fail(air: Air) -> None:
    air.error, air.answer = WorkerLost("given up after 6 attempts", stage="sealed"), RIGHT[:2]


def mangle(air: Air) -> None:
    air.answer = [1, 2, 3, 4]


def shorten(air: Air) -> None:
    air.answer = RIGHT[:3]


def stay(air: Air) -> None:
    air.num_bytes = 0


@pytest.mark.parametrize(
    ("ill", "why"),
    [
        (hang, "no answer within 0.01 s"),
        (fail, "given up after 6 attempts"),
        (mangle, r"\[1, 2, 3, 4\] came, where \[5, 6, 7, 8\] came before"),
        (shorten, "3 tokens came instead of 4"),
        (stay, "no KV moved"),
    ],
)
async def test_what_fails_twice_is_a_verdict_that_names_the_pair(
    air: Air, ill: Callable[[Air], None], why: str
) -> None:
    assert (await air.next_verdict()).trouble == ""
    ill(air)
    with pytest.raises(TandemError, match=f"^p1 → d1: .*{why}"):
        raise TandemError((await air.next_verdict()).trouble)
    assert len(air.asked) == 3


async def test_a_path_that_works_again_is_ready_again(air: Air) -> None:
    air.hangs = True
    assert (await air.next_verdict()).trouble
    air.hangs = False
    assert not (await air.next_verdict()).trouble


async def test_bad_news_is_old_after_a_second(air: Air) -> None:
    air.hangs = True
    await air.next_verdict()
    num_asked = len(air.asked)
    air.hangs = False
    air.now += 1.0
    air.canary.verdict()
    await asyncio.sleep(0)
    assert len(air.asked) == num_asked + 1


async def test_a_pair_that_leaves_meanwhile_is_no_fault_of_the_path_either(air: Air) -> None:
    air.hangs = True
    air.canary.verdict()
    air.workers = PAIR[:1]
    flight = air.canary._flight
    assert flight is not None
    await asyncio.wait([flight])
    air.workers = PAIR
    assert air.canary.verdict() == Verdict("", air.now)


async def test_a_failure_before_there_is_a_pair_names_none(air: Air) -> None:
    air.refuses = LocalFault("the request could not be sent")
    assert (await air.next_verdict()).trouble == "no pair was found: the request could not be sent"


def turn_away(air: Air) -> None:
    air.refuses = Overloaded("every decode worker's queue is full")


def let_wait(air: Air) -> None:
    air.hangs = air.is_full = True


@pytest.mark.parametrize("is_full", [turn_away, let_wait])
async def test_workers_without_room_are_no_verdict_however_long_that_lasts(
    air: Air, is_full: Callable[[Air], None]
) -> None:
    air.workers = (PAIR[0], candidate("d1", Role.DECODE, load=Load(num_running=9)))
    is_full(air)
    for _ in range(3):
        assert (await air.next_verdict()).trouble == ""
        air.now += EXCUSE_S
    assert not air.canary.is_pending
    air.refuses, air.hangs, air.is_full = None, True, False
    air.now -= EXCUSE_S
    assert (await air.next_verdict()).trouble == ""  # the other work is in its way
    air.now += EXCUSE_S
    assert "no answer" in (await air.next_verdict()).trouble


async def test_workers_without_room_do_not_clear_a_path_that_was_seen_not_to_work(air: Air) -> None:
    air.hangs = True
    broken = await air.next_verdict()
    air.is_full = True
    assert (await air.next_verdict()).trouble == broken.trouble != ""


async def test_a_pair_that_just_left_is_no_fault_of_the_path(air: Air) -> None:
    air.refuses = NoWorker("no decode worker is connected")
    assert (await air.next_verdict()).trouble == ""


async def test_other_work_excuses_a_failure_for_a_while(air: Air) -> None:
    await air.next_verdict()
    air.workers = (candidate("p1", Role.PREFILL, load=Load(num_waiting=9)), PAIR[1])
    air.hangs = True
    assert not (await air.next_verdict()).trouble
    air.now += EXCUSE_S
    assert (await air.next_verdict()).trouble


# In the flow.


async def test_a_canary_whose_blocks_no_decode_worker_has_room_for_says_so() -> None:
    house = House("p1", "d1")
    stream = await house.flow.start_canary(NewRequest(prompt=(1, 2, 3), params=SamplingParams(max_tokens=4)))
    house.says("p1", token(stream.id, 0))
    assert not stream.is_refused
    for _ in range(3):
        house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
        house.timers.advance(2.0)
        assert stream.is_refused
    house.reports("d1", stream.id, Stage.ADOPTED)
    assert not stream.is_refused
    await stream.aclose()


async def test_a_canary_travels_though_its_prompt_is_short_and_nobody_hears_of_it() -> None:
    house = House("p1", "d1", threshold=64)
    air = Air()
    await air.next_verdict()
    stream = await house.flow.start_canary(air.asked[0])
    _, attach = house.last_attach()
    assert not attach.local
    assert house.flow.last_adopted_at == float("-inf")
    house.says("p1", token(stream.id, 0))
    house.says("d1", *[token(stream.id, at, last=at == 3) for at in range(1, 4)])
    assert len(await read_all(stream)) == 4
    heard = house.heard
    assert (heard.changes, heard.ends, heard.local, heard.num_tokens) == ([], [], [], 0)
    assert house.flow.num_inflight == house.admission.num_inflight == 0
