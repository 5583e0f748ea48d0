"""The engine's step with a fake runner that makes every wrong block visible as a wrong token."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable

import pytest

from engine.core import SOON_FREE_EVERY_S, EngineCore
from engine.facts import EngineFacts
from engine.output import Filled, StepOutput
from engine.stepper import MAX_FAILED_IN_A_ROW
from proto.errors import InvalidRequest, LocalFault, LocalProtocolError, Overloaded, RemoteProtocolError
from proto.hashing import BlockHasher
from proto.ids import RequestId
from proto.inventory import Evicted, Stored
from proto.request import FinishReason, Request, TokenOut
from tests.support.paged_engine import (
    EOS,
    VOCAB,
    ZERO,
    FakeMemory,
    FakeRunner,
    make_facts,
    make_request,
    oracle,
)


class Bench:
    """A core on a fake memory, stepped by hand."""

    def __init__(self, facts: EngineFacts | None = None, **options: object) -> None:
        self.facts = facts or make_facts()
        self.memory = FakeMemory(self.facts)
        self.runner = FakeRunner(self.memory, self.facts)
        self.hasher = BlockHasher("fake", self.facts.block_size)
        self.core = EngineCore(self.runner, self.memory, self.facts, self.hasher, **options)  # type: ignore[arg-type]
        self.outputs: list[StepOutput] = []

    def step(self) -> StepOutput:
        output = self.core.step()
        self.outputs.append(output)
        self.core.check_integrity()
        return output

    def drain(self, limit: int = 500) -> list[TokenOut]:
        """Steps until nothing can be done; what was generated on the way."""
        tokens: list[TokenOut] = []
        for _ in range(limit):
            if not self.core.has_work():
                return tokens
            tokens += self.step().tokens
        raise AssertionError("the engine does not come to an end")

    def filled(self, request: str) -> list[Filled]:
        return [f for output in self.outputs for f in output.filled if f.request == request]

    def expect(self, requests: Iterable[Request], tokens: list[TokenOut]) -> None:
        """``tokens`` are exactly the oracle's for ``requests``, each choice's in order."""
        made: dict[tuple[str, int], list[TokenOut]] = defaultdict(list)
        for token in tokens:
            made[token.request, token.choice].append(token)
        wanted = {
            (request.id, choice): oracle(request, choice, self.facts)
            for request in requests
            for choice in range(request.params.n)
        }
        assert dict(made) == {key: value for key, value in wanted.items() if value}


def prompt_of(length: int, start: int = 2) -> list[int]:
    return [2 + (start * 7 + i * i + i) % (VOCAB - 2) for i in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 40])
@pytest.mark.parametrize("chunked", [True, False])
def test_one_request(length: int, chunked: bool) -> None:
    bench = Bench(make_facts(max_num_batched_tokens=64 if not chunked else 7), enable_chunked_prefill=chunked)
    request = make_request("a", prompt_of(length))
    bench.core.add(request)
    bench.expect([request], bench.drain())
    assert bench.core.is_idle()


@pytest.mark.parametrize("length", [3, 4, 9])
def test_choices_fork_from_one_prefill(length: int) -> None:
    bench = Bench()
    request = make_request("a", prompt_of(length), n=4, ignore_eos=True)
    bench.core.add(request)
    bench.expect([request], bench.drain())
    first, second = bench.runner.batches[:2]
    assert [len(row.samples) for row in first.rows] == [4]
    assert len(second.rows) == 4
    assert len(second.copies) == (3 if length % 4 else 0)
    assert bench.core.is_idle()


def test_many_requests_on_a_tiny_pool_preempt_and_stay_exact() -> None:
    bench = Bench(make_facts(num_blocks=7, max_model_len=28))
    requests = [make_request(f"r{i}", prompt_of(5 + i, i), n=1 + i % 3, max_tokens=12, seed=i) for i in range(6)]
    for request in requests:
        bench.core.add(request)
    bench.expect(requests, bench.drain())
    assert bench.core.stats.num_preemptions > 0
    assert any(output.preempted for output in bench.outputs)
    assert bench.core.is_idle()


def test_the_oldest_is_never_preempted() -> None:
    bench = Bench(make_facts(num_blocks=6, max_model_len=24))
    for i in range(4):
        bench.core.add(make_request(f"r{i}", prompt_of(4, i), max_tokens=20, ignore_eos=True))
    bench.drain()
    assert {request for output in bench.outputs for request in output.preempted} <= {"r1", "r2", "r3"}
    assert bench.core.is_idle()


def test_cached_prefixes_are_not_computed_again() -> None:
    bench = Bench()
    one, two = make_request("a", prompt_of(17), max_tokens=1), make_request("b", prompt_of(17), max_tokens=3)
    bench.core.add(one)
    bench.expect([one], bench.drain())
    bench.core.add(two)
    output = bench.step()
    assert (output.started, output.num_cached) == (("b",), (16,))
    assert bench.runner.batches[-1].num_tokens == 1
    assert bench.core.num_cached(two.id) == 16
    bench.expect([two], [*output.tokens, *bench.drain()])
    assert bench.core.stats.cache_hit_tokens == 16
    assert bench.core.stats.cache_query_tokens == 34


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    bench = Bench()
    one, two = make_request("a", prompt_of(16), max_tokens=1), make_request("b", prompt_of(16), max_tokens=3)
    bench.core.add(one)
    bench.drain()
    bench.core.add(two)
    bench.expect([two], bench.drain())
    assert bench.outputs[-3].num_cached == (12,)


def test_salts_keep_prefixes_apart() -> None:
    bench = Bench()
    for name, salt in (("a", "x"), ("b", "y")):
        request = make_request(name, prompt_of(17), salt=salt)
        bench.core.add(request)
        bench.expect([request], bench.drain())
    assert bench.core.stats.cache_hit_tokens == 0


def test_equal_prompts_at_once_are_computed_once() -> None:
    bench = Bench(make_facts(max_num_batched_tokens=64))
    requests = [make_request(name, prompt_of(33), seed=i, max_tokens=2) for i, name in enumerate("abc")]
    for request in requests:
        bench.core.add(request)
    bench.expect(requests, bench.drain())
    assert bench.runner.batches[0].num_tokens == 33
    assert [len(row.tokens) for row in bench.runner.batches[1].rows] in ([1, 1, 1], [1, 1])
    assert bench.core.stats.cache_hit_tokens == 64


def test_without_prefix_caching_nothing_is_shared_between_requests() -> None:
    bench = Bench(enable_prefix_caching=False)
    for name in "ab":
        request = make_request(name, prompt_of(17))
        bench.core.add(request)
        bench.expect([request], bench.drain())
    assert bench.core.stats.cache_hit_tokens == 0
    assert bench.core.cached_hashes() == []
    assert bench.core.take_cache_events() == []


def test_a_resume_goes_on_where_it_stopped() -> None:
    whole = make_request("a", prompt_of(9), n=3, ignore_eos=True)
    bench = Bench()
    sent = [tuple(t.token for t in oracle(whole, choice, bench.facts))[: 2 * choice] for choice in range(3)]
    resumed = make_request("a", prompt_of(9), n=3, ignore_eos=True, forced=tuple(sent))
    bench.core.add(resumed)
    tokens = bench.drain()
    bench.expect([resumed], tokens)
    assert {t.choice: t.position for t in reversed(tokens)} == {0: 0, 1: 2, 2: 4}
    assert tokens == sorted(tokens, key=tokens.index)
    assert bench.core.is_idle()


def test_a_resume_has_no_more_of_finished_choices() -> None:
    bench = Bench()
    forced = ((3, EOS), (3,), tuple([5] * 8))
    bench.core.add(make_request("a", prompt_of(6), n=3, max_tokens=8, forced=forced))
    assert {token.choice for token in bench.drain()} == {1}
    bench.core.add(make_request("b", prompt_of(6), forced=((EOS,),)))
    assert not bench.core.has_work()
    assert bench.core.is_idle()


def test_stop_rules() -> None:
    bench = Bench()
    requests = [
        make_request("stop", prompt_of(5), stop_token_ids=tuple(range(2, VOCAB)), max_tokens=9),
        make_request("late", prompt_of(5), stop_token_ids=tuple(range(3, VOCAB)), max_tokens=9, min_tokens=4),
        make_request("length", prompt_of(5), ignore_eos=True, max_tokens=3),
        make_request("context", prompt_of(60), ignore_eos=True, max_tokens=None),
        make_request("context2", prompt_of(60, 3), ignore_eos=True, max_tokens=50),
    ]
    for request in requests:
        bench.core.add(request)
    tokens = bench.drain()
    bench.expect(requests, tokens)
    last = {token.request: token for token in tokens}
    assert last["stop"].finish is FinishReason.STOP
    assert last["stop"].stop_token == last["stop"].token
    assert last["late"].position >= 4
    assert [last[name].position for name in ("length", "context", "context2")] == [2, 3, 3]
    assert last["context"].finish is FinishReason.LENGTH


def test_priorities_order_the_queue_unless_all_are_served_as_they_come() -> None:
    for options, order in (({"policy": "fcfs"}, ["low", "high"]), ({}, ["high", "low"])):
        bench = Bench(make_facts(max_num_seqs=1), **options)
        bench.core.add(make_request("low", prompt_of(3), priority=5, max_tokens=1))
        bench.core.add(make_request("high", prompt_of(3, 5), priority=-1, max_tokens=1))
        assert [token.request for token in bench.drain()] == order


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    bench = Bench(make_facts(num_blocks=8, max_model_len=64))
    with pytest.raises(InvalidRequest, match="need 9 KV blocks of 4 tokens; this worker has 8"):
        bench.core.add(make_request("a", prompt_of(30), max_tokens=4))
    bench.core.add(make_request("a", prompt_of(30), max_tokens=3, ignore_eos=True))
    bench.core.add(make_request("b", prompt_of(30), max_tokens=None, ignore_eos=True))
    with pytest.raises(InvalidRequest, match="context of 64"):
        bench.core.add(make_request("c", prompt_of(64)))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        bench.core.add(make_request("c", [VOCAB]))
    with pytest.raises(InvalidRequest, match="n is 9"):
        bench.core.add(make_request("c", [3], n=9))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        bench.core.add(make_request("c", [3], stop_token_ids=(VOCAB,)))
    tokens = bench.drain()
    assert {t.request: t.position for t in tokens} == {"a": 2, "b": 2}
    assert bench.core.is_idle()


def test_the_queue_is_bounded_but_not_for_resumes() -> None:
    bench = Bench(max_num_queued=2)
    bench.core.add(make_request("a", prompt_of(5)))
    bench.core.add(make_request("b", prompt_of(6, 3)))
    with pytest.raises(Overloaded) as caught:
        bench.core.add(make_request("c", prompt_of(5)))
    assert caught.value.retry_after_s == 1.0
    bench.core.add(make_request("d", prompt_of(7, 5), forced=((4,),)))
    assert bench.step().started[0] == "d"
    bench.core.add(make_request("c", prompt_of(5)))


def test_who_is_turned_away_is_told_when_a_place_is_free() -> None:
    ticks = itertools.count(step=100)
    bench = Bench(make_facts(max_num_seqs=1), max_num_queued=2, clock=lambda: float(next(ticks)))
    bench.core.add(make_request("a", prompt_of(8), max_tokens=20, ignore_eos=True))
    bench.step()
    for name, length in (("b", 10), ("c", 30)):
        bench.core.add(make_request(name, prompt_of(length)))
    with pytest.raises(Overloaded) as caught:
        bench.core.add(make_request("d", prompt_of(5)))
    assert caught.value.retry_after_s == pytest.approx(20 / bench.core.load().tokens_per_s)


def test_a_twice_used_id_is_our_own_fault() -> None:
    bench = Bench()
    bench.core.add(make_request("a", prompt_of(5)))
    with pytest.raises(LocalProtocolError):
        bench.core.add(make_request("a", prompt_of(5)))
    with pytest.raises(LocalProtocolError):
        bench.core.reserve(RequestId("a"), bench.hasher.all_blocks(prompt_of(5)), 5, 1)
    bench.drain()
    bench.core.add(make_request("a", prompt_of(5)))


def test_abort_and_finish_choice_in_every_stage() -> None:
    bench = Bench(make_facts(max_num_seqs=4))
    request = make_request("a", prompt_of(9), n=3, ignore_eos=True)
    for num_steps in range(6):
        bench.core.add(request)
        bench.core.add(make_request("w", prompt_of(9), n=2))
        for _ in range(num_steps):
            bench.step()
        bench.core.abort(request.id)
        bench.core.abort(RequestId("w"))
        bench.core.abort(request.id)
        bench.core.check_integrity()
        assert bench.core.is_idle()
    for num_steps in range(6):
        bench.core.add(request)
        before = [token for _ in range(num_steps) for token in bench.step().tokens]
        for choice in (0, 2, 2):
            bench.core.finish_choice(request.id, choice)
        bench.core.check_integrity()
        after = bench.drain()
        assert {token.choice for token in after} == {1}
        assert [t for t in before + after if t.choice == 1] == oracle(request, 1, bench.facts)
        assert bench.core.is_idle()


def test_hold_announces_blocks_as_they_fill_and_keeps_them() -> None:
    started: list[str] = []
    bench = Bench(make_facts(max_num_batched_tokens=10), on_started=started.append)
    bench.runner.on_run = lambda: started.append("run")
    request = make_request("a", prompt_of(22), n=2, ignore_eos=True)
    bench.core.add(request, hold=True)
    tokens = bench.drain()
    assert started == ["a", "run", "run", "run"]
    assert [(len(f.blocks), f.first_index, f.sealed, f.num_tokens_last) for f in bench.filled("a")] == [
        (2, 0, False, 0),
        (3, 2, False, 0),
        (1, 5, True, 2),
    ]
    assert tokens == [oracle(request, choice, bench.facts)[0] for choice in (0, 1)]
    table = bench.core.block_table(request.id)
    assert table == tuple(block for f in bench.filled("a") for block in f.blocks)
    assert bench.memory.read(table, 24) == [*request.prompt, ZERO, ZERO]
    assert not bench.core.has_work()
    assert not bench.core.is_idle()
    bench.core.release(request.id)
    bench.core.release(request.id)
    assert bench.core.is_idle()
    with pytest.raises(LocalProtocolError):
        bench.core.block_table(request.id)


def test_a_held_prompt_announces_cached_blocks_first() -> None:
    bench = Bench()
    for name in "ab":
        bench.core.add(make_request(name, prompt_of(16), ignore_eos=True), hold=True)
        bench.drain()
    assert [(len(f.blocks), f.first_index, f.sealed, f.num_tokens_last) for f in bench.filled("b")] == [(4, 0, True, 4)]
    assert bench.core.block_table(RequestId("b"))[:3] == bench.core.block_table(RequestId("a"))[:3]
    bench.core.abort(RequestId("a"))
    bench.core.release(RequestId("b"))
    assert bench.core.is_idle()


def test_a_hold_that_ends_at_its_first_token() -> None:
    bench = Bench(make_facts(max_num_batched_tokens=8))
    bench.core.add(make_request("short", prompt_of(3), n=2, max_tokens=1), hold=True)
    assert {token.finish for token in bench.drain()} == {FinishReason.LENGTH}
    assert bench.core.is_idle()
    # What was announced may be read by a sender until the tier says that it is not.
    bench.core.add(make_request("long", prompt_of(11), max_tokens=1), hold=True)
    bench.drain()
    assert [f.sealed for f in bench.filled("long")] == [False]
    assert not bench.core.is_idle()
    bench.core.release(RequestId("long"))
    assert bench.core.is_idle()


def test_held_prompts_are_not_counted_and_block_others_only_by_memory() -> None:
    bench = Bench(make_facts(num_blocks=8, max_num_seqs=1))
    for name in "ab":
        bench.core.add(make_request(name, prompt_of(13, ord(name)), ignore_eos=True), hold=True)
    bench.core.add(make_request("c", prompt_of(5), max_tokens=3))
    assert {token.request for token in bench.drain()} == {"a", "b"}
    assert bench.core.load().num_waiting == 1
    bench.core.release(RequestId("b"))
    assert {token.request for token in bench.drain()} == {"c"}


def hand_over(source: Bench, target: Bench, request: Request) -> list[int]:
    """P computes and holds, D reserves; the cells travel. Returns the first tokens."""
    source.core.add(request, hold=True)
    first = [token.token for token in source.drain()]
    table = source.core.block_table(request.id)
    hashes = source.hasher.all_blocks(request.prompt, request.cache_salt)
    room = target.core.reserve(request.id, hashes, len(request.prompt), request.params.n)
    assert room is not None
    target.core.check_integrity()
    for here, there in list(zip(table, room.blocks, strict=True))[room.num_present :]:
        target.memory.cells[there][:] = source.memory.cells[here]
    source.core.release(request.id)
    return first


@pytest.mark.parametrize(("length", "n"), [(3, 1), (4, 1), (9, 3), (12, 3)])
def test_a_hand_over_continues_exactly(length: int, n: int) -> None:
    source, target = Bench(), Bench()
    for name in ("a", "b"):
        request = make_request(name, prompt_of(length), n=n, ignore_eos=True, seed=ord(name))
        first = hand_over(source, target, request)
        target.core.adopt(request, first)
        target.core.check_integrity()
        assert target.core.num_cached(request.id) == (0 if name == "a" else length // 4 * 4)
        rest = target.drain()
        for choice in range(n):
            whole = oracle(request, choice, target.facts)
            assert first[choice] == whole[0].token
            assert [t for t in rest if t.choice == choice] == whole[1:]
        assert source.core.is_idle()
        assert target.core.is_idle()


def test_a_resume_of_one_choice_can_be_handed_over() -> None:
    source, target = Bench(), Bench()
    whole = make_request("a", prompt_of(6), ignore_eos=True)
    sent = tuple(t.token for t in oracle(whole, 0, source.facts)[:3])
    request = make_request("a", prompt_of(6), ignore_eos=True, forced=(sent,))
    source.core.add(request, hold=True)
    [first] = source.drain()
    assert first.position == 3
    tokens = (*request.prompt, *sent)
    room = target.core.reserve(request.id, target.hasher.all_blocks(tokens), len(tokens), 1)
    assert room is not None
    for here, there in zip(source.core.block_table(request.id), room.blocks, strict=True):
        target.memory.cells[there][:] = source.memory.cells[here]
    target.core.adopt(request, [first.token])
    assert [first, *target.drain()] == oracle(whole, 0, target.facts)[3:]
    two = make_request("b", prompt_of(6), n=2, forced=((3,), (4,)))
    with pytest.raises(LocalProtocolError):
        source.core.add(two, hold=True)


def test_choices_that_are_over_are_not_adopted() -> None:
    source, target = Bench(), Bench()
    request = make_request("a", prompt_of(9), n=3, ignore_eos=True)
    first = hand_over(source, target, request)
    target.core.finish_choice(request.id, 2)
    target.core.adopt(request, first)
    target.core.check_integrity()
    assert {token.choice for token in target.drain()} == {0, 1}
    done = make_request("b", prompt_of(9), n=2, max_tokens=1)
    room = target.core.reserve(done.id, target.hasher.all_blocks(done.prompt), 9, 2)
    assert room is not None
    assert room.num_present == 2
    target.core.adopt(done, [3, 4])
    assert not target.core.has_work()
    assert target.core.is_idle()


def test_reservations_are_checked() -> None:
    bench = Bench(make_facts(num_blocks=8))
    hashes = bench.hasher.all_blocks(prompt_of(9))
    with pytest.raises(RemoteProtocolError):
        bench.core.reserve(RequestId("a"), hashes, 13, 1)
    with pytest.raises(InvalidRequest, match="this worker has 8"):
        bench.core.reserve(RequestId("a"), bench.hasher.all_blocks(prompt_of(31)), 31, 1)
    with pytest.raises(LocalProtocolError):
        bench.core.adopt(make_request("a", prompt_of(9)), [3])
    assert bench.core.reserve(RequestId("a"), hashes, 9, 1) is not None
    for wrong in (
        make_request("a", prompt_of(8)),
        make_request("a", prompt_of(9, 5)),
        make_request("a", prompt_of(9), n=2),
    ):
        with pytest.raises(RemoteProtocolError):
            bench.core.adopt(wrong, [3])
    with pytest.raises(InvalidRequest):
        bench.core.adopt(make_request("a", prompt_of(9), max_tokens=40), [3])
    bench.core.cancel(RequestId("a"))
    bench.core.cancel(RequestId("a"))
    assert bench.core.is_idle()
    assert bench.core.cached_hashes() == []


def test_a_cancelled_reservation_keeps_what_is_verified() -> None:
    bench = Bench()
    prompt = prompt_of(14)
    hashes = bench.hasher.all_blocks(prompt)
    for num_verified, num_present in ((2, 0), (4, 2), (0, 3)):
        room = bench.core.reserve(RequestId("a"), hashes, 14, 1)
        assert room is not None
        assert room.num_present == num_present
        for index in range(room.num_present, num_verified):
            bench.memory.cells[room.blocks[index]][:] = (prompt + [ZERO] * 2)[4 * index : 4 * index + 4]
        bench.core.cancel(RequestId("a"), num_verified)
        bench.core.check_integrity()
        assert set(bench.core.cached_hashes()) <= set(hashes[:3]), "a partial block is never cached"
    request = make_request("b", prompt)
    bench.core.add(request)
    bench.expect([request], bench.drain())
    assert bench.core.stats.cache_hit_tokens == 12


def test_no_room_is_promised_while_blocks_or_seats_are_lacking() -> None:
    bench = Bench(make_facts(num_blocks=8, max_num_seqs=3))
    hashes = bench.hasher.all_blocks(prompt_of(9, 9))
    assert bench.core.reserve(RequestId("a"), hashes, 9, 2) is not None
    assert bench.core.reserve(RequestId("b"), hashes, 9, 2) is None
    assert bench.core.reserve(RequestId("b"), hashes, 9, 1) is None
    bench.core.cancel(RequestId("a"))
    assert bench.core.reserve(RequestId("b"), hashes, 9, 3) is not None
    # Nothing of a reservation can be taken by who runs, who then waits for its end.
    request = make_request("c", prompt_of(5), max_tokens=9)
    bench.core.add(request)
    assert bench.drain() == []
    assert bench.core.reserve(RequestId("d"), bench.hasher.all_blocks([3]), 1, 1) is None
    bench.core.cancel(RequestId("b"))
    bench.expect([request], bench.drain())
    assert bench.core.is_idle()


def test_a_match_in_the_free_queue_is_not_counted_as_free() -> None:
    bench = Bench(make_facts(num_blocks=4))
    hashes = bench.hasher.all_blocks(prompt_of(9))
    assert bench.core.reserve(RequestId("a"), hashes, 9, 1) is not None
    bench.core.cancel(RequestId("a"), 3)
    # The two cached blocks and two more are all there are: enough for one choice, not for two.
    with pytest.raises(InvalidRequest):
        bench.core.reserve(RequestId("b"), hashes, 9, 2)
    assert bench.core.reserve(RequestId("c"), bench.hasher.all_blocks([3]), 1, 1) is not None
    assert bench.core.reserve(RequestId("b"), hashes, 9, 1) is None
    bench.core.cancel(RequestId("c"))
    assert bench.core.reserve(RequestId("b"), hashes, 9, 1) is not None
    bench.core.check_integrity()


def test_preempted_work_goes_before_new_reservations() -> None:
    bench = Bench(make_facts(num_blocks=8, max_model_len=32))
    requests = [make_request(name, prompt_of(11, ord(name)), max_tokens=16, ignore_eos=True) for name in "ab"]
    for request in requests:
        bench.core.add(request)
    tokens = []
    while not bench.core.stats.num_preemptions:
        tokens += bench.step().tokens
    assert bench.core.reserve(RequestId("c"), bench.hasher.all_blocks([3]), 1, 1) is None
    bench.expect(requests, tokens + bench.drain())
    assert bench.core.reserve(RequestId("c"), bench.hasher.all_blocks([3]), 1, 1) is not None


def test_a_runner_that_fails_leaves_the_core_as_it_was() -> None:
    bench = Bench()
    request = make_request("a", prompt_of(9), n=3, ignore_eos=True)
    bench.core.add(request)
    tokens: list[TokenOut] = []
    for _ in range(4):
        bench.runner.failures.append(RuntimeError("device lost"))
        with pytest.raises(RuntimeError, match="device lost"):
            bench.core.step()
        bench.core.check_integrity()
        tokens += bench.step().tokens
    bench.expect([request], tokens + bench.drain())
    assert bench.core.is_idle()


def test_a_request_without_finite_numbers_fails_alone() -> None:
    """Its prompt begins as another's, in chunks; it has choices; and what it computed matches nobody afterwards."""
    bench = Bench(make_facts(max_num_batched_tokens=8))
    sound = make_request("sound", prompt_of(9), max_tokens=12, ignore_eos=True)
    bench.core.add(sound)
    tokens = [*bench.step().tokens, *bench.step().tokens]
    bad = [*prompt_of(9), *prompt_of(20, 5)]
    bench.runner.poison = [tuple(bad[:12])]
    bench.core.add(make_request("bad", bad, n=3))
    for _ in range(4):
        tokens += bench.step().tokens
    assert [output.failed for output in bench.outputs if output.failed] == [("bad",)]
    assert bench.core.stats.num_failed == 1
    assert bench.core.stats.num_running == 1
    tokens += bench.drain()
    bench.expect([sound], tokens)
    assert bench.core.is_idle()
    assert set(bench.core.cached_hashes()).isdisjoint(bench.hasher.all_blocks(bad))


def test_a_choice_without_finite_numbers_ends_its_request() -> None:
    bench = Bench()
    request = make_request("a", prompt_of(9), n=3, max_tokens=20, ignore_eos=True)
    made = [token.token for token in oracle(request, 1, bench.facts)]
    bench.runner.poison = [(*prompt_of(9), *made[:5])]
    bench.core.add(request)
    tokens = bench.drain()
    assert [token.token for token in tokens if token.choice == 1] == made[:5]
    assert {token.position for token in tokens} == set(range(6)), "the one before it in the step had its sixth"
    assert [output.failed for output in bench.outputs if output.failed] == [("a",)]
    assert bench.core.is_idle()


def test_what_a_failed_prompt_has_announced_stays_until_it_is_released() -> None:
    bench = Bench(make_facts(max_num_batched_tokens=8))
    bench.runner.poison = [tuple(prompt_of(21))]
    bench.core.add(make_request("a", prompt_of(21)), hold=True)
    while not any(output.failed for output in bench.outputs):
        bench.step()
    announced = [block for filled in bench.filled("a") for block in filled.blocks]
    assert len(announced) == 4
    assert not any(filled.sealed for filled in bench.filled("a"))
    assert set(announced) <= set(bench.core.block_table(RequestId("a")))
    assert bench.core.cached_hashes() == []
    bench.core.abort(RequestId("a"))
    assert bench.core.is_idle()


def test_numbers_that_are_never_finite_end_the_engine() -> None:
    bench = Bench()
    bench.runner.poison = [(2,)]
    for number in range(MAX_FAILED_IN_A_ROW):
        bench.core.add(make_request(f"bad{number}", [2, 3]))
        assert bench.step().failed == (f"bad{number}",)
    bench.core.add(make_request("good", [3]))
    bench.drain()
    for number in range(MAX_FAILED_IN_A_ROW):
        bench.core.add(make_request(f"bad{number}", [2, 3]))
        bench.step()
    bench.core.add(make_request("last", [2]))
    with pytest.raises(LocalFault, match="not finite for 17 requests in a row"):
        bench.core.step()


def test_cache_events_replay_to_the_inventory() -> None:
    bench = Bench(make_facts(num_blocks=10, max_model_len=36))
    inventory: set[bytes] = set()
    for i in range(12):
        bench.core.add(make_request(f"r{i}", prompt_of(9 + i, i), ignore_eos=True))
        bench.drain()
        for event in bench.core.take_cache_events():
            if isinstance(event, Stored):
                assert inventory.isdisjoint(event.hashes)
                inventory |= set(event.hashes)
            else:
                assert isinstance(event, Evicted)
                assert inventory.issuperset(event.hashes)
                inventory -= set(event.hashes)
        assert inventory == set(bench.core.cached_hashes())
    bench.core.clear_cache()
    assert bench.core.cached_hashes() == []
    bench.core.check_integrity()


def test_load_counts_what_is_to_be_computed() -> None:
    ticks = iter(range(100))
    bench = Bench(make_facts(max_num_batched_tokens=10), clock=lambda: float(next(ticks)))
    bench.core.add(make_request("a", prompt_of(14), ignore_eos=True))
    bench.core.add(make_request("b", prompt_of(7, 5), ignore_eos=True))
    load = bench.core.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (0, 2, 21)
    assert (load.num_free_blocks, load.num_blocks, load.tokens_per_s) == (32, 32, 0.0)
    bench.step()
    load = bench.core.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 11)
    assert load.tokens_per_s == 10.0
    bench.drain()
    stats = bench.core.stats
    assert stats.prompt_tokens_computed == 21
    assert stats.generated_tokens == 16
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 32)


def num_soon_free(bench: Bench) -> int:
    return bench.core.load().num_soon_free_blocks


def test_blocks_are_soon_free_when_their_last_sequence_ends_by_its_limit() -> None:
    """Blocks of 4 tokens; the two prompts have their first 8 tokens, which is two blocks, in common."""
    bench = Bench(make_facts(max_model_len=128), clock=itertools.count().__next__)
    bench.core.add(make_request("long", prompt_of(9), max_tokens=100, ignore_eos=True))
    bench.step()
    assert num_soon_free(bench) == 0, "it may say 99 more"
    bench.core.add(make_request("short", [*prompt_of(8), 5, 6], max_tokens=40, ignore_eos=True))
    while bench.core.load().num_waiting:
        bench.step()
    assert num_soon_free(bench) == 0, "39 more are not soon"
    for _ in range(7):
        bench.step()
    assert num_soon_free(bench) == 3, "of 18 tokens, 32 before its end; the two shared ones stay"
    bench.core.abort(RequestId("long"))
    assert num_soon_free(bench) == 5
    bench.drain()
    assert num_soon_free(bench) == 0
    assert bench.core.is_idle()


def test_blocks_that_choices_share_are_soon_free_when_all_of_them_end() -> None:
    bench = Bench(clock=itertools.count().__next__)
    bench.core.add(make_request("a", prompt_of(9), n=3, max_tokens=4, ignore_eos=True))
    bench.step()
    load = bench.core.load()
    assert load.num_soon_free_blocks == load.num_blocks - load.num_free_blocks > 0
    bench.core.finish_choice(RequestId("a"), 1)
    load = bench.core.load()
    assert load.num_soon_free_blocks == load.num_blocks - load.num_free_blocks > 0


def test_no_end_is_in_sight_for_what_is_computed_held_or_reserved() -> None:
    bench = Bench(clock=itertools.count().__next__)
    bench.core.add(make_request("prompt", prompt_of(30), max_tokens=2, ignore_eos=True))
    bench.step()
    assert bench.core.load().num_running == 1
    assert num_soon_free(bench) == 0, "its prompt is not computed yet"
    bench.drain()
    bench.core.add(make_request("held", prompt_of(9), max_tokens=2, ignore_eos=True), hold=True)
    bench.drain()
    bench.core.add(
        make_request("resumed", prompt_of(9, 3), max_tokens=12, forced=((3, 4, 5, 6, 7, 8, 9, 10),)), hold=True
    )
    bench.step()
    assert bench.core.load().num_running == 1
    assert num_soon_free(bench) == 0, "one token before the end of what is to be computed, it will be held"
    bench.drain()
    arriving = prompt_of(9, 5)
    assert bench.core.reserve(RequestId("reserved"), bench.hasher.all_blocks(arriving), len(arriving), 1)
    assert bench.core.load().num_free_blocks < bench.facts.num_blocks
    assert num_soon_free(bench) == 0


def test_what_is_soon_free_is_counted_now_and_then_and_is_never_free_already() -> None:
    times = [0.0]
    bench = Bench(clock=lambda: times[0])
    assert num_soon_free(bench) == 0
    bench.core.add(make_request("a", prompt_of(9), max_tokens=3, ignore_eos=True))
    bench.core.add(make_request("b", prompt_of(5, 5), max_tokens=9, ignore_eos=True))
    bench.step()
    assert num_soon_free(bench) == 0, "as it was a moment ago"
    times[0] += SOON_FREE_EVERY_S
    load = bench.core.load()
    assert load.num_soon_free_blocks == load.num_blocks - load.num_free_blocks > 0
    while bench.core.has_work():
        bench.step()
        now = bench.core.load()
        assert now.num_soon_free_blocks == min(load.num_soon_free_blocks, now.num_blocks - now.num_free_blocks)
