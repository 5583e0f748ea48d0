"""Steps on a device that computes by itself, and captured graphs, against the runner of the CPU.

Here the device is the CPU, and a captured graph is its work done again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import build
from engine.batch import Row, SampleSpec, StepBatch
from engine.build import EngineParts, load_engine_parts
from engine.core import EngineCore
from engine.device_runner import DeviceRunner
from engine.graphs import DecodeGraphs, default_sizes, plan
from engine.runner import Runner
from engine.stepper import RunnerLike
from kernels.dispatch import REFERENCE
from proto.errors import SettingsError
from proto.ids import RequestId
from proto.request import Request, SamplingParams, TokenOut
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import greedy, load_model
from tests.support.no_waits import without_waits

NUM_BLOCKS = 40
SPARE = NUM_BLOCKS - 1
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


class Captures:
    """Captures nothing: what replays a graph does its work again."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        work()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


@pytest.fixture(scope="module", params=["qwen3", "window"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device-runner")
    if request.param == "window":
        return make_checkpoint(folder, "qwen2", max_position_embeddings=128, **WINDOW)
    return make_checkpoint(folder, "qwen3", max_position_embeddings=128)


def make_settings(folder: Path) -> EngineSettings:
    return EngineSettings(
        model=ModelSettings(model=str(folder), device="cpu", skip_warmup=True),
        cache=CacheSettings(num_gpu_blocks_override=NUM_BLOCKS, block_size=8),
        scheduler=SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=48),
    )


class Bench:
    """The same model on a runner of the CPU and on one of a device, each with its own memory."""

    def __init__(self, folder: Path) -> None:
        self.here, self.there = (load_engine_parts(make_settings(folder)) for _ in range(2))
        self.captures = Captures()
        # The last block is nobody's: it takes what padding writes.
        self.facts = replace(self.there.facts, num_blocks=SPARE)
        model = load_model(folder)
        self.graphs = DecodeGraphs(model, self.there.kv.paged, self.facts, (1, 2, 4), SPARE, self.captures)
        self.runner = Runner(model, self.here.kv, self.facts)
        self.device_runner = DeviceRunner(model, self.there.kv, self.facts, self.graphs)

    def agree(self, batch: StepBatch) -> list[list[int]]:
        """Both runners' tokens; and their memories are the same but for the spare block."""
        expected, found = self.runner.run(batch), self.device_runner.run(batch)
        for row, expected_row in zip(found, expected, strict=True):
            assert [each.token for each in row] == [each.token for each in expected_row]
            for one, other in zip(row, expected_row, strict=True):
                assert (one.logprobs is None) == (other.logprobs is None)
                if one.logprobs is not None and other.logprobs is not None:
                    assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
        torch.testing.assert_close(
            self.there.kv.paged.data[:SPARE], self.here.kv.paged.data[:SPARE], rtol=1e-4, atol=1e-5
        )
        return [[each.token for each in row] for row in found]


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder)
    yield bench
    bench.here.kv.close()
    bench.there.kv.close()


def spec(seed: int, position: int = 0, logprobs: int | None = None) -> SampleSpec:
    params = SamplingParams(temperature=0.9, top_p=0.95, logprobs=logprobs).checked()
    return SampleSpec(0, seed, position, params, (), ())


def prompt_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(5, 300) for _ in range(length)]


def test_graphs_are_captured_largest_first_for_every_size(bench: Bench) -> None:
    assert bench.captures.num_captured == 3
    assert bench.captures.num_replayed == 0
    rows = [Row([5], 0, [block], (greedy(),)) for block in range(5)]
    assert bench.graphs.takes(rows[:4])
    assert not bench.graphs.takes(rows)
    assert not bench.graphs.takes([Row([5, 6], 0, [0], (greedy(),))])


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, (1,)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (20, (1, 2, 4, 8, 16, 20))],
)
def test_default_sizes_end_with_the_largest_batch(most: int, expected: tuple[int, ...]) -> None:
    assert default_sizes(most) == expected
    assert default_sizes(280)[-3:] == (256, 272, 280)
    assert max(default_sizes(9999)) == 512


def test_sizes_are_planned_where_kernels_can_be_captured() -> None:
    kernels = replace(REFERENCE, is_capturable=True)
    assert plan(ModelSettings(), kernels, 6) == (1, 2, 4, 6)
    assert plan(ModelSettings(cuda_graph_sizes=("8", "1", "3")), kernels, 8) == (1, 3, 8)
    assert plan(ModelSettings(enforce_eager=True), kernels, 8) == ()
    assert plan(ModelSettings(cuda_graph_sizes=("8",)), REFERENCE, 8) == ()
    for sizes in (("0",), ("9",), ("two",), ("-1", "4")):
        with pytest.raises(SettingsError, match="from 1 to max_num_seqs"):
            plan(ModelSettings(cuda_graph_sizes=sizes), kernels, 8)


def test_a_start_captures_graphs_and_keeps_a_block_for_their_padding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the device."""
    captures = Captures()
    monkeypatch.setattr(build, "CudaCapture", lambda device: captures)
    monkeypatch.setattr(build.graphs, "plan", lambda settings, kernels, most: default_sizes(most))
    phases: list[str] = []
    parts = load_engine_parts(make_settings(folder), lambda name, seconds: phases.append(name))
    parts.kv.close()
    assert phases == ["find", "weights", "memory", "graphs"]
    assert captures.num_captured == 4
    assert (parts.facts.num_blocks, parts.kv.num_blocks) == (NUM_BLOCKS, NUM_BLOCKS + 1)
    assert not parts.kv.paged.data[:NUM_BLOCKS].any()
    assert parts.kv.paged.data[NUM_BLOCKS].any()

    def fails(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(build, "CudaCapture", lambda device: fails)
    with pytest.raises(SettingsError, match=r"not permitted when stream is capturing.*--enforce-eager"):
        load_engine_parts(make_settings(folder))


def test_batches_of_every_kind_agree(bench: Bench) -> None:
    prompts = [prompt_of(length, length) for length in (20, 7, 33, 3, 16)]
    tables = [[0, 9, 4, 16], [1, 15], [2, 11, 20, 30, 31], [3], [5, 6, 7]]
    first = tuple(
        Row(prompt, 0, table, (spec(n, logprobs=2), spec(n + 50)))
        for n, (prompt, table) in enumerate(zip(prompts[:3], tables[:3], strict=True))
    )
    tokens = [row[0] for row in bench.agree(StepBatch(first))]
    assert bench.captures.num_replayed == 0
    lengths = [len(prompt) for prompt in prompts]
    # Decodes alone take a graph; beside a prompt they do not. Rows come and go, and change their places.
    for step, running in enumerate([(0, 1, 2), (2, 0), (2, 0, 1), (1,), (0, 1, 2)], start=1):
        rows = []
        for n in running:
            rows.append(Row([tokens[n]], lengths[n], tables[n], (spec(n, step, logprobs=3),)))
            lengths[n] += 1
        found = bench.agree(StepBatch(tuple(rows)))
        for n, [token] in zip(running, found, strict=True):
            tokens[n] = token
        assert bench.captures.num_replayed == step
    mixed = (Row([tokens[0]], lengths[0], tables[0], (spec(0),)), Row(prompts[3], 0, tables[3], (spec(3),)))
    bench.agree(StepBatch(mixed))
    assert bench.captures.num_replayed == 5
    bench.agree(StepBatch((Row(prompts[4][:9], 0, tables[4]),)))
    bench.agree(StepBatch((Row(prompts[4][9:10], 9, tables[4]),)))  # one token of a prompt, and no draw
    bench.agree(StepBatch((Row([8], 20, [12, 13, 14], (greedy(),)),), copies=((0, 12), (9, 13), (4, 14))))


def test_rows_that_follow_take_their_tokens_from_the_step_before(bench: Bench) -> None:
    """With a graph and without, the same as knowing the tokens."""
    prompts = [prompt_of(length, length) for length in (9, 4, 11, 5, 8)]
    for count in (3, 5):
        rows = [Row(prompt, 0, [2 * n, 2 * n + 1], (spec(n),)) for n, prompt in enumerate(prompts[:count])]
        tokens = [token for [token] in bench.agree(StepBatch(tuple(rows)))]
        order = list(reversed(range(count)))
        unknown, known = [], []
        for n in order:
            row = Row([tokens[n]], len(prompts[n]), [2 * n, 2 * n + 1], (spec(n, 1),))
            known.append(row)
            unknown.append(replace(row, tokens=(0,), follows=n))
        expected = bench.runner.run(StepBatch(tuple(known)))
        assert bench.device_runner.run(StepBatch(tuple(unknown))) == expected
    assert bench.captures.num_replayed == 1


def test_submitting_waits_for_nothing(bench: Bench) -> None:
    prompts = [prompt_of(9, 1), prompt_of(4, 2)]
    batch = StepBatch(tuple(Row(p, 0, [2 * n, 2 * n + 1], (spec(n, 0, 3),)) for n, p in enumerate(prompts)))
    first = without_waits(lambda: bench.device_runner.submit(batch))
    following = StepBatch(
        tuple(Row([0], len(p), [2 * n, 2 * n + 1], (spec(n, 1, 3),), follows=n) for n, p in enumerate(prompts))
    )
    second = without_waits(lambda: bench.device_runner.submit(following))
    assert bench.captures.num_replayed == 1
    assert len(first.result()) == len(second.result()) == 2


def test_numbers_that_are_not_finite_give_no_token_and_change_no_other(bench: Bench) -> None:
    """By replay and without; the step that was submitted after such a one runs to its end, too."""
    for prefix in ([], [7, 8]):
        sound = Row([*prefix, 5], 0, [1], (greedy(),))
        [expected] = bench.device_runner.run(StepBatch((sound,)))
        bench.there.kv.paged.data[0] = torch.nan
        step = bench.device_runner.submit(StepBatch((Row([5], 3, [0], (greedy(),)), sound)))
        follows = Row([0], 4, [0], (greedy(),), follows=0), Row([0], len(sound.tokens), [1], (greedy(),), follows=1)
        following = bench.device_runner.submit(StepBatch(follows))
        assert step.result() == (None, expected)
        bad, good = following.result()
        assert (bad, good is None) == (None, False)
        bench.there.kv.paged.data[0] = 0


def generate(bench: Bench, runner: RunnerLike, parts: EngineParts, *, runs_ahead: bool) -> dict[str, list[TokenOut]]:
    """Requests of many kinds, some arriving while others run."""
    core = EngineCore(runner, parts.kv, bench.facts, parts.hasher, runs_ahead=runs_ahead)
    dice = random.Random(11)
    made: dict[str, list[TokenOut]] = {}
    for number in range(10):
        params = SamplingParams(
            n=dice.choice([1, 1, 1, 2]),
            temperature=dice.choice([0.0, 0.7, 1.0]),
            frequency_penalty=dice.choice([0.0, 0.0, 0.6]),
            repetition_penalty=dice.choice([1.0, 1.0, 1.2]),
            max_tokens=dice.choice([3, 12, 25]),
            stop_token_ids=[dice.randrange(5, 300) for _ in range(12)],
            min_tokens=dice.choice([0, 2]),
            seed=dice.getrandbits(60),
            logprobs=dice.choice([None, 1]),
        )
        if params.n > 1:
            params = replace(params, temperature=0.8)
        prompt = tuple(prompt_of(dice.randrange(1, 40), number))
        request = Request(id=RequestId(f"r{number}"), prompt=prompt, params=params.checked())
        core.add(request)
        for _ in range(dice.randrange(6)):
            if core.has_work():
                for token in core.step().tokens:
                    made.setdefault(f"{token.request}-{token.choice}", []).append(token)
        core.check_integrity()
    while core.has_work():
        for token in core.step().tokens:
            made.setdefault(f"{token.request}-{token.choice}", []).append(token)
    assert core.is_idle()
    return made


def test_an_engine_that_runs_ahead_generates_the_same(bench: Bench) -> None:
    expected = generate(bench, bench.runner, bench.here, runs_ahead=False)
    found = generate(bench, bench.device_runner, bench.there, runs_ahead=True)
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        again = [replace(token, logprobs=None) for token in found[name]]
        assert again == [replace(token, logprobs=None) for token in tokens]
    assert any(token.stop_token is not None for tokens in found.values() for token in tokens)
    assert bench.captures.num_replayed > 10
