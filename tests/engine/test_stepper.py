"""Running ahead: which steps are scheduled before the results of the one before, and what becomes of a row too much."""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.output import StepOutput
from proto.hashing import BlockHasher
from proto.ids import RequestId
from proto.request import FinishReason, Request, TokenOut
from tests.support.paged_engine import FakeMemory, FakeRunner, make_facts, make_request, oracle


class Bench:
    """A core that runs ahead of a device which computes a batch only when its result is asked for."""

    def __init__(self, num_blocks: int = 32, **options: object) -> None:
        self.facts = make_facts(num_blocks=num_blocks)
        self.memory = FakeMemory(self.facts)
        self.runner = FakeRunner(self.memory, self.facts, is_late=True)
        self.hasher = BlockHasher("fake", self.facts.block_size)
        self.core = EngineCore(
            self.runner,
            self.memory,
            self.facts,
            self.hasher,
            runs_ahead=True,
            **options,  # type: ignore[arg-type]
        )

    def add(self, name: str, prompt: list[int], **params: object) -> Request:
        request = make_request(name, prompt, **params)  # type: ignore[arg-type]
        self.core.add(request)
        return request

    def step(self) -> StepOutput:
        output = self.core.step()
        self.core.check_integrity()
        return output

    def drain(self) -> list[TokenOut]:
        tokens: list[TokenOut] = []
        while self.core.has_work():
            tokens += self.step().tokens
        return tokens

    @property
    def last_starts(self) -> list[int]:
        return [row.start for row in self.runner.batches[-1].rows]


def ended_by_token(bench: Bench, at_least: int) -> Request:
    """A request whose choice ends by EOS or a stop token after a few tokens, not by its length."""
    for seed in range(1000):
        request = make_request("ends", [3, 4, 5], seed=seed, max_tokens=20, stop_token_ids=(1,))
        made = oracle(request, 0, bench.facts)
        if at_least <= len(made) < 12 and made[-1].finish is FinishReason.STOP:
            return request
    raise AssertionError("no such seed")


def test_a_decode_step_is_submitted_before_the_one_before_it_has_run() -> None:
    bench = Bench()
    request = bench.add("a", [3, 4, 5], ignore_eos=True, max_tokens=6)
    tokens = list(bench.step().tokens)  # The prompt, whose result is waited for.
    assert len(bench.runner.batches) == 1
    for number in range(1, 5):
        tokens += bench.step().tokens
        assert len(tokens) == number + 1
        # The one that was waited for, and one more; the last token's length is known, so nothing follows it.
        assert len(bench.runner.batches) == min(number + 2, 6)
    row = bench.runner.batches[-1].rows[0]
    assert (row.start, row.follows, row.samples[0].position) == (7, 0, 5)
    tokens += bench.drain()
    assert tokens == oracle(request, 0, bench.facts)
    assert len(bench.runner.batches) == 6
    assert bench.core.is_idle()


def test_a_row_too_much_is_dropped_and_its_blocks_are_free_only_when_it_has_run() -> None:
    bench = Bench()
    request = ended_by_token(bench, at_least=3)
    expected = oracle(request, 0, bench.facts)
    bench.core.add(request)
    tokens: list[TokenOut] = []
    while len(tokens) < len(expected):
        tokens += bench.step().tokens
    assert tokens == expected
    num_blocks = bench.facts.num_blocks
    assert bench.core.load().num_running == 0
    load = bench.core.load()
    assert load.num_free_blocks < num_blocks, "the device still writes to them"
    assert load.num_free_blocks + load.num_soon_free_blocks == num_blocks
    assert not bench.core.is_idle()
    assert bench.core.has_work()
    output = bench.step()
    assert (output.tokens, output.num_tokens) == ((), 0)
    assert bench.core.is_idle()


def test_room_for_another_prompt_is_never_what_the_device_still_writes_to() -> None:
    """What arrives from elsewhere lies in blocks that no step under way computes."""
    bench = Bench(num_blocks=8)
    request = ended_by_token(bench, at_least=4)
    bench.core.add(request)
    while len(bench.core.step().tokens) == 0 or bench.core.load().num_running:
        pass
    arriving = [5, 6, 7, 8, 9, 10, 11]
    room = bench.core.reserve(RequestId("b"), bench.hasher.all_blocks(arriving), len(arriving), 1)
    assert room is not None
    for index, token in enumerate([*arriving, -1]):
        bench.memory.cells[room.blocks[index // 4]][index % 4] = token
    bench.drain()
    assert bench.memory.read(room.blocks, 8) == [*arriving, -1]
    follower = make_request("b", arriving, ignore_eos=True)
    [first, *rest] = oracle(follower, 0, bench.facts)
    bench.core.adopt(follower, [first.token])
    assert bench.drain() == rest


def arrive(bench: Bench, request: Request) -> list[TokenOut]:
    """The prompt was computed elsewhere, with the first token of each choice. What is still to come."""
    prompt, num_choices = request.prompt, request.params.n
    room = bench.core.reserve(request.id, bench.hasher.all_blocks(prompt), len(prompt), num_choices)
    assert room is not None
    for index, token in enumerate(prompt):
        bench.memory.cells[room.blocks[index // 4]][index % 4] = token
    made = [oracle(request, choice, bench.facts) for choice in range(num_choices)]
    bench.core.adopt(request, [choice[0].token for choice in made])
    return [token for choice in made for token in choice[1:]]


def test_what_was_adopted_joins_without_a_pause() -> None:
    bench = Bench()
    first = bench.add("a", [3, 4, 5], ignore_eos=True, max_tokens=9)
    tokens = [*bench.step().tokens, *bench.step().tokens]
    rest = arrive(bench, make_request("b", [6, 7, 8, 9, 10], ignore_eos=True, max_tokens=5))
    num_batches = len(bench.runner.batches)
    tokens += bench.step().tokens
    assert len(bench.runner.batches) == num_batches + 1
    assert [row.follows for row in bench.runner.batches[-1].rows] == [0, None]
    tokens += bench.drain()
    assert [t for t in tokens if t.request == "a"] == oracle(first, 0, bench.facts)
    assert [t for t in tokens if t.request == "b"] == rest


def test_choices_that_share_a_block_are_parted_first() -> None:
    bench = Bench()
    first = bench.add("a", [3, 4, 5], ignore_eos=True, max_tokens=9)
    tokens = [*bench.step().tokens, *bench.step().tokens]
    rest = arrive(bench, make_request("b", [6, 7, 8, 9, 10], n=2, ignore_eos=True, max_tokens=5))
    num_batches = len(bench.runner.batches)
    tokens += bench.step().tokens
    assert len(bench.runner.batches) == num_batches
    tokens += bench.drain()
    assert [t for t in tokens if t.request == "a"] == oracle(first, 0, bench.facts)
    assert sorted((t for t in tokens if t.request == "b"), key=lambda t: t.choice) == rest


def test_a_prompt_waits_for_the_results_of_the_step_before() -> None:
    bench = Bench()
    requests = [bench.add("a", [3, 4, 5], ignore_eos=True, max_tokens=9)]
    tokens = [*bench.step().tokens, *bench.step().tokens]
    requests.append(bench.add("b", [6, 7], ignore_eos=True, max_tokens=4))
    num_batches = len(bench.runner.batches)
    tokens += bench.step().tokens
    assert len(bench.runner.batches) == num_batches
    output = bench.step()
    assert output.started == ("b",)
    assert {token.request for token in output.tokens} == {"a", "b"}
    tokens += [*output.tokens, *bench.drain()]
    for request in requests:
        assert [t for t in tokens if t.request == request.id] == oracle(request, 0, bench.facts)


def test_prompts_of_several_choices_and_held_ones_are_not_run_ahead_of() -> None:
    bench = Bench()
    request = bench.add("a", [3], n=2, ignore_eos=True, max_tokens=4)
    held = make_request("b", [4], ignore_eos=True)
    bench.core.add(held, hold=True)
    tokens = list(bench.step().tokens)
    assert len(bench.runner.batches) == 1
    assert bench.core.block_table(held.id)
    tokens += bench.drain()
    for choice in range(2):
        made = [token for token in tokens if token.request == "a" and token.choice == choice]
        assert made == oracle(request, choice, bench.facts)
    bench.core.release(held.id)
    assert bench.core.is_idle()


@pytest.mark.parametrize("fails_late", [False, True])
def test_a_step_that_fails_is_tried_again_with_the_one_that_ran_ahead_of_it(fails_late: bool) -> None:
    bench = Bench()
    requests = [bench.add(name, [3, 4, ord(name) % 16], ignore_eos=True, max_tokens=12) for name in "ab"]
    tokens: list[TokenOut] = []
    failures = bench.runner.late_failures if fails_late else bench.runner.failures
    for _ in range(5):
        tokens += bench.step().tokens
        failures.append(RuntimeError("device lost"))
        with pytest.raises(RuntimeError, match="device lost"):
            bench.core.step()
        bench.core.check_integrity()
    tokens += bench.drain()
    for request in requests:
        assert [t for t in tokens if t.request == request.id] == oracle(request, 0, bench.facts)
    assert bench.core.is_idle()


def test_time_that_two_steps_share_is_counted_once() -> None:
    now = [0.0]
    bench = Bench(clock=lambda: now[0])
    bench.runner.on_run = lambda: now.__setitem__(0, now[0] + 1.0)
    bench.add("a", [3, 4, 5], ignore_eos=True, max_tokens=8)
    durations = []
    while bench.core.has_work():
        durations.append(bench.step().duration_s)
    assert sum(durations) == now[0] == bench.core.stats.busy_s


def test_a_row_too_much_of_a_request_that_fails_is_dropped() -> None:
    bench = Bench()
    other = bench.add("b", [6, 7], ignore_eos=True, max_tokens=12)
    request = make_request("a", [3, 4, 5], ignore_eos=True, max_tokens=12)
    made = [token.token for token in oracle(request, 0, bench.facts)]
    bench.runner.poison = [(3, 4, 5, *made[:4])]
    bench.core.add(request)
    tokens: list[TokenOut] = []
    failed: list[str] = []
    while bench.core.has_work():
        output = bench.step()
        tokens += output.tokens
        failed += output.failed
    assert failed == ["a"]
    assert [token.token for token in tokens if token.request == "a"] == made[:4]
    assert [token for token in tokens if token.request == "b"] == oracle(other, 0, bench.facts)
    assert bench.core.is_idle()
