"""On the compiled kernels a sequence's logits are the same, bit for bit, in any batch and however its prompt is cut.

That is what lets a resumed request go on with the tokens it would have had. Skipped where the kernels cannot run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.dispatch import choose
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import CPU, Driver, load_model

WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "overrides"), [("qwen3", {}), ("qwen2", WINDOW), ("llama", {"attention_bias": True})]
)
def test_logits_do_not_depend_on_batch_or_chunks(family: str, overrides: dict[str, object], tmp_path: Path) -> None:
    kernels = choose(CPU, torch.bfloat16)
    if kernels.name != "amx":
        pytest.skip("the compiled kernels cannot run here")
    folder = make_checkpoint(tmp_path, family, dtype="bfloat16", head_dim=32, tie_word_embeddings=True, **overrides)
    model = load_model(folder, torch.bfloat16, kernels)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 320, (n,), generator=generator).tolist() for n in (1, 16, 45, 130, 700, 33)]

    def generate(which: list[list[int]], chunk_size: int) -> list[tuple[list[int], list[torch.Tensor]]]:
        driver = Driver(model)
        driver.kv = driver.kv.bfloat16()
        return driver.generate(which, chunk_size, num_new=8)

    together = generate(prompts, 64)
    for chunk_size in (1, 50, 1024):
        for prompt, (tokens, seen) in zip(prompts, together, strict=True):
            if chunk_size == 1 and len(prompt) > 50:
                continue
            [(other_tokens, other_seen)] = generate([prompt], chunk_size)
            assert other_tokens == tokens
            assert all(torch.equal(logits, other) for logits, other in zip(seen, other_seen, strict=True))
