"""On batch-invariant kernels a sequence's logits have the same bits in any batch and however its prompt is cut.

That is what lets a resumed request go on with the tokens it would have had. On AMX, bfloat16 has it without asking.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_core, load_engine_parts
from kernels.cpu import ordered
from kernels.dispatch import Task, choose, choose_batch_invariant
from kernels.types import Kernels
from proto.errors import SettingsError
from proto.ids import RequestId
from proto.request import Request, SamplingParams
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import CPU, Driver, load_model

Generated = list[tuple[list[int], list[torch.Tensor]]]

WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
DYNAMIC = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiles": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "soft-capped": ("gemma2", {}),
    "odd-sizes": ("qwen3", {"head_dim": 24, "intermediate_size": 72}),
    "window": ("qwen2", {"head_dim": 32, **WINDOW}),
    "biases-gelu-dynamic": ("llama", {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh", **DYNAMIC}),
}


@pytest.fixture(params=["float32", "bfloat16", "bfloat16-tiles", "bfloat16-unasked"])
def kernels(request: pytest.FixtureRequest) -> tuple[Kernels, torch.dtype]:
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    if request.param == "bfloat16":
        return ordered.make(), dtype
    task = Task(CPU, dtype, head_dim=32)
    chosen = choose(task) if request.param.endswith("unasked") else choose_batch_invariant(task)
    if "-" in request.param and not chosen.name.startswith("amx"):
        pytest.skip("there are no tiles here")
    return chosen, dtype


def same(one: Generated, other: Generated) -> None:
    for (tokens, seen), (other_tokens, other_seen) in zip(one, other, strict=True):
        assert tokens == other_tokens
        assert all(torch.equal(logits, again) for logits, again in zip(seen, other_seen, strict=True))


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 320, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_batch_or_chunks(
    name: str, kernels: tuple[Kernels, torch.dtype], tmp_path: Path
) -> None:
    chosen, dtype = kernels
    if not chosen.is_batch_invariant and name != "tiles":
        pytest.skip("what tiles do not take goes to torch unless asked for")
    family, overrides = MODELS[name]
    model = load_model(make_checkpoint(tmp_path, family, dtype="bfloat16", **overrides), dtype, chosen)

    def generate(prompts: list[list[int]], chunk_size: int, num_new: int = 4) -> Generated:
        driver = Driver(model)
        driver.kv = driver.kv.to(dtype)
        return driver.generate(prompts, chunk_size, num_new)

    prompts = prompts_of([1, 16, 45, 130, 700 if name in ("tiles", "window") else 200, 33, 2, 64])
    alone = [generate([prompt], 512)[0] for prompt in prompts]
    for chunk_size in (16, 32, 512):
        same(generate(prompts, chunk_size), alone)
    for chunk_size in (1, 16, 32):
        same([generate([prompt], chunk_size)[0] for prompt in prompts[:4]], alone[:4])

    many = prompts[:4] + prompts_of([3, 7, 18] * 20)
    same(generate(many, 16)[:4], alone[:4])
    for tokens, seen in alone:  # as after a preemption or a crash: prompt and what was emitted, in one chunk
        [(_, [again])] = generate([tokens[:-1]], 512, num_new=1)
        assert torch.equal(again, seen[-1])


def settings(folder: Path, num_blocks: int, chunk: int, kv: str = "auto", **model: Any) -> EngineSettings:
    return EngineSettings(
        model=ModelSettings(model=str(folder), device="cpu", max_model_len=128, batch_invariant=True, **model),
        cache=CacheSettings(num_gpu_blocks_override=num_blocks, kv_cache_dtype=kv),
        scheduler=SchedulerSettings(max_num_batched_tokens=chunk, max_num_seqs=8),
    )


def serve(given: EngineSettings) -> tuple[dict[tuple[str, int], list[tuple[int, object]]], int]:
    """Tokens with their logprobs per request and choice, and how many were preempted."""
    parts = load_engine_parts(given)
    core = build_core(parts, given)
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20, ignore_eos=True, logprobs=3, n=2)
    for index, prompt in enumerate(prompts_of([28, 30, 9, 31, 17])):
        core.add(Request(id=RequestId(f"t.{index}"), prompt=tuple(prompt), params=replace(params, seed=index)))
    outputs: dict[tuple[str, int], list[tuple[int, object]]] = {}
    num_preempted = 0
    while core.has_work():
        step = core.step()
        num_preempted += len(step.preempted)
        for token in step.tokens:
            outputs.setdefault((token.request, token.choice), []).append((token.token, token.logprobs))
    core.check_integrity()
    parts.kv.close()
    return outputs, num_preempted


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_preempts_gives_the_very_same_logprobs(dtype: str, kv: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", head_dim=32)
    roomy, none = serve(settings(folder, 200, 512, kv, dtype=dtype))
    tight, some = serve(settings(folder, 8, 24, kv, dtype=dtype))
    assert (none, some > 0) == (0, True)
    assert len(roomy) == 10
    assert tight == roomy


def test_numerics_name_it_and_not_the_threads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            parts = load_engine_parts(settings(folder, 8, 64, threads=threads))
            parts.kv.close()
            found.append(parts.facts.numerics)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert "ordered" in found[0]
    assert "batch-invariant" in found[0]


def test_what_cannot_be_invariant_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"batch_invariant.*float16"):
        load_engine_parts(settings(make_checkpoint(tmp_path / "a"), 8, 64, dtype="float16"))
    with pytest.raises(SettingsError, match=r"batch_invariant.*288"):
        load_engine_parts(settings(make_checkpoint(tmp_path / "b", head_dim=288), 8, 64))
