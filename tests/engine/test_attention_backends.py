"""An engine on Triton's attention gives the tokens of one on torch's: alone, together, in chunks and from the cache.

Without a GPU the kernels are interpreted: a tiny model, and few tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.build import build_core, load_engine_parts
from proto.ids import RequestId
from proto.request import Request, SamplingParams
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tests.support.checkpoints import make_checkpoint

pytest.importorskip("triton")

WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def serve(folder: Path, attention: str, kv: str, prompts: list[list[int]]) -> dict[str, list[int]]:
    """Greedy tokens of each prompt; the last one comes when the others are done."""
    given = EngineSettings(
        model=ModelSettings(
            model=str(folder),
            dtype="float32",
            threads=1,
            max_model_len=128,
            attention_backend=attention,
            skip_warmup=True,
        ),
        cache=CacheSettings(num_gpu_blocks_override=64, kv_cache_dtype=kv),
        scheduler=SchedulerSettings(max_num_batched_tokens=40, max_num_seqs=8),
    )
    parts = load_engine_parts(given)
    core = build_core(parts, given)
    outputs: dict[str, list[int]] = {}
    for batch in (prompts[:-1], prompts[-1:]):
        for prompt in batch:
            name = RequestId(f"t.{len(outputs)}")
            outputs[name] = []
            params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, seed=0)
            core.add(Request(id=name, prompt=tuple(prompt), params=params))
        while core.has_work():
            for token in core.step().tokens:
                outputs[token.request].append(token.token)
    assert core.stats.cache_hit_tokens >= 48
    parts.kv.close()
    return outputs


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("family", "overrides"), [("qwen2", {}), ("qwen2", WINDOW), ("gemma2", {})], ids=["full", "window", "soft-capped"]
)
def test_tokens_are_those_of_torch(family: str, overrides: dict[str, object], kv: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, **overrides)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 320, (length,), generator=generator).tolist() for length in (1, 17, 60)]
    prompts.append(prompts[2][:50])
    assert serve(folder, "triton", kv, prompts) == serve(folder, "torch", kv, prompts)
