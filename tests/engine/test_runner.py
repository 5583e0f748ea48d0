"""The runner: batches to tokens, copies first, several choices from one row, and a guard against broken numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.batch import Row, Sampled, SampleSpec, StepBatch
from engine.build import EngineParts, load_engine_parts
from engine.sampler import Draw, sample
from proto.request import SamplingParams, derive_seed
from proto.settings import CacheSettings, EngineSettings, ModelSettings
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import Driver, greedy, load_model

PROMPT = [7, 300, 12, 45, 99, 8, 250, 33, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runner"), "qwen2")


@pytest.fixture
def parts(folder: Path) -> Iterator[EngineParts]:
    model = ModelSettings(model=str(folder), device="cpu", skip_warmup=True)
    parts = load_engine_parts(EngineSettings(model=model, cache=CacheSettings(num_gpu_blocks_override=32)))
    yield parts
    parts.kv.close()


def specs(num: int, temperature: float = 1.0, position: int = 0) -> tuple[SampleSpec, ...]:
    params = SamplingParams(n=num, temperature=temperature, seed=42, logprobs=2)
    return tuple(SampleSpec(i, derive_seed(42, i), position, params, (), ()) for i in range(num))


def test_rows_come_back_in_the_order_they_went(parts: EngineParts) -> None:
    """Decode rows are computed before chunks; results must not show it."""
    rows = [
        Row(PROMPT, 0, [4, 9], (greedy(),)),
        Row([5], 0, [1], specs(2)),
        Row(PROMPT[:5], 0, [2]),
        Row([6], 0, [3], (greedy(),)),
        Row(PROMPT[:9], 0, [7], specs(1)),
    ]
    together = parts.runner.run(StepBatch(tuple(rows)))
    assert [len(row) for row in together] == [1, 2, 0, 1, 1]
    alone = [parts.runner.run(StepBatch((row,)))[0] for row in rows]
    assert [[s.token for s in row] for row in together] == [[s.token for s in row] for row in alone]


def test_equals_the_model_driven_by_hand(parts: EngineParts, folder: Path) -> None:
    [(expected, _)] = Driver(load_model(folder)).generate([PROMPT], 512, num_new=8)
    tokens, start, given = list(PROMPT), 0, PROMPT
    for _ in range(8):
        [[sampled]] = parts.runner.run(StepBatch((Row(given, start, [20, 3, 11], (greedy(),)),)))
        start, given = len(tokens), [sampled.token]
        tokens.append(sampled.token)
    assert tokens == expected


def test_choices_of_one_row_share_its_logits(parts: EngineParts, folder: Path) -> None:
    [found] = parts.runner.run(StepBatch((Row(PROMPT, 0, [0, 1], specs(4)),)))
    driver = Driver(load_model(folder))
    [logits] = driver.forward([Row(PROMPT, 0, driver.blocks(32), (greedy(),))])
    expected = sample(logits[None], [Draw(0, spec) for spec in specs(4)])
    assert [s.token for s in found] == [s.token for s in expected]
    assert len({s.token for s in found}) > 1
    tops = {s.logprobs.top for s in found if s.logprobs}
    assert len(tops) == 1


def test_copies_happen_before_the_step(parts: EngineParts) -> None:
    """Two forks of one prompt: each writes its own copy of the partial block, and neither sees the other's token."""
    runner = parts.runner
    runner.run(StepBatch((Row(PROMPT, 0, [0, 1]),)))
    forks = (Row([50], 18, [0, 1], (greedy(),)), Row([60], 18, [0, 2], (greedy(),)))
    forked = runner.run(StepBatch(forks, copies=((1, 2),)))
    for row, token in zip(forked, (50, 60), strict=True):
        [[fresh]] = runner.run(StepBatch((Row([*PROMPT, token], 0, [5, 6], (greedy(),)),)))
        assert row == (Sampled(fresh.token),)
    assert torch.equal(parts.kv.paged.data[1, :, :, :2], parts.kv.paged.data[2, :, :, :2])
    assert not torch.equal(parts.kv.paged.data[1, :, :, 2], parts.kv.paged.data[2, :, :, 2])


def test_a_batch_of_copies_alone(parts: EngineParts) -> None:
    parts.kv.paged.data[3] = 1.5
    assert parts.runner.run(StepBatch((), copies=((3, 4),))) == ()
    assert bool((parts.kv.paged.data[4] == 1.5).all())


def test_blocks_that_travelled_continue_the_same(parts: EngineParts, folder: Path) -> None:
    """What a hand-off does: the prompt's blocks as bytes, into other places of another worker's memory."""
    model = ModelSettings(model=str(folder), device="cpu", skip_warmup=True)
    other = load_engine_parts(EngineSettings(model=model, cache=CacheSettings(num_gpu_blocks_override=16)))
    [[first]] = parts.runner.run(StepBatch((Row(PROMPT, 0, [8, 30], (greedy(),)),)))
    for source, destination in ((8, 15), (30, 2)):
        other.kv.write(destination, parts.kv.read(source))
    here = parts.runner.run(StepBatch((Row([first.token], 18, [8, 30], specs(1)),)))
    there = other.runner.run(StepBatch((Row([first.token], 18, [15, 2], specs(1)),)))
    assert here == there
    other.kv.close()


def test_the_draw_depends_on_its_position(parts: EngineParts) -> None:
    base = specs(1)[0]
    row = Row(PROMPT, 0, [0, 1], tuple(replace(base, position=position) for position in range(12)))
    [found] = parts.runner.run(StepBatch((row,)))
    assert len({sampled.token for sampled in found}) > 3


def test_numbers_that_are_not_finite_give_no_token_and_change_no_other(parts: EngineParts) -> None:
    sound = Row([5], 0, [1], (greedy(),))
    [expected] = parts.runner.run(StepBatch((sound,)))
    parts.kv.paged.data[0] = torch.nan
    rows = (Row([5, 6], 3, [0]), Row([5], 3, [0], (greedy(), specs(2)[1])), sound)
    assert parts.runner.run(StepBatch(rows)) == (None, None, expected)
    parts.kv.paged.data[0] = 0


def test_numbers_whose_squares_are_too_large_give_no_token(tmp_path: Path) -> None:
    """A norm makes zeros of them: finite, and every token as likely as any other."""
    folder = make_checkpoint(tmp_path, "qwen2", poison=300, poison_with=1e25)
    model = ModelSettings(model=str(folder), device="cpu", skip_warmup=True)
    parts = load_engine_parts(EngineSettings(model=model, cache=CacheSettings(num_gpu_blocks_override=4)))
    sound = Row([5, 6], 0, [0], (greedy(),))
    [expected] = parts.runner.run(StepBatch((sound,)))
    assert parts.runner.run(StepBatch((sound, Row([5, 300], 0, [1], (greedy(),))))) == (expected, None)
    parts.kv.close()


def test_a_block_table_too_short_is_our_own_fault(parts: EngineParts) -> None:
    with pytest.raises(AssertionError, match="2 blocks needed, 1 given"):
        parts.runner.run(StepBatch((Row(PROMPT, 0, [0], (greedy(),)),)))
