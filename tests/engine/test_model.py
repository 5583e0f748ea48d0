"""The decoder against `transformers` in float32: logits, greedy tokens, chunks, mixed batches, every family."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Row
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import Driver, greedy, load_model

LENGTHS = (1, 15, 16, 17, 100, 700, 33, 5)
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha-wide-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
    "llama-mqa-gelu": ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama3-new-spelling": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    "yarn-mscale": ("llama", {"rope_parameters": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.9, **YARN}}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "gemma2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma2-uncapped": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention"],
            "hidden_activation": "silu",
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}


def load_oracle(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def oracle_logits(oracle: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = oracle(torch.tensor([tokens])).logits[0]
    return logits


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(tuple(torch.randint(5, 320, (n,), generator=generator).tolist()) for n in LENGTHS)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = make_checkpoint(tmp_path, family, **overrides)
    oracle, model = load_oracle(folder), load_model(folder)
    expected: dict[tuple[int, ...], torch.Tensor] = {}

    def check(generated: list[tuple[list[int], list[torch.Tensor]]]) -> None:
        for tokens, seen in generated:
            key = tuple(tokens)
            if key not in expected:
                expected[key] = oracle_logits(oracle, tokens)
            first = len(tokens) - len(seen) - 1
            for position, logits in enumerate(seen, start=first):
                target = expected[key][position]
                assert (logits - target).abs().max() <= 1e-5 * target.abs().max()
                assert int(target.argmax()) == tokens[position + 1]

    for chunk_size in (32, 512):
        check(Driver(model).generate(prompts(), chunk_size, num_new=6))
    for prompt in prompts()[:6]:
        check(Driver(model).generate([prompt], 512, num_new=6))


def test_dynamic_scaling_beyond_the_original_context_follows_cached_generation(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    oracle, model = load_oracle(folder), load_model(folder)
    prompt = list(prompts()[4][:30])
    [(tokens, seen)] = Driver(model).generate([prompt], 512, num_new=40)
    cache, given = None, prompt
    for logits, token in zip(seen, tokens[len(prompt) :], strict=True):
        with torch.no_grad():
            output = oracle(torch.tensor([given]), past_key_values=cache, use_cache=True)
        cache, given = output.past_key_values, [token]
        target = output.logits[0, -1]
        assert (logits - target).abs().max() <= 1e-5 * target.abs().max()


def test_chunk_boundaries_do_not_matter(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, "mistral", sliding_window=24))
    prompt = prompts()[4]
    results = [Driver(model).generate([prompt], size, num_new=3)[0] for size in (1, 7, 16, 100)]
    for tokens, seen in results[1:]:
        assert tokens == results[0][0]
        for logits, other in zip(seen, results[0][1], strict=True):
            torch.testing.assert_close(logits, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_rows_read_only_their_own_blocks(tmp_path: Path) -> None:
    """The driver's memory is NaN outside of a sequence's blocks: one stray read would spread to the logits."""
    model = load_model(make_checkpoint(tmp_path))
    for _, seen in Driver(model, num_blocks=80, block_size=16).generate(prompts(), 64, num_new=2):
        assert all(torch.isfinite(logits).all() for logits in seen)


@pytest.mark.parametrize("block_size", [1, 8, 48])
def test_any_block_size(block_size: int, tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, "qwen2"))
    expected = Driver(model).generate([prompts()[4]], 32, num_new=4)[0][0]
    found = Driver(model, num_blocks=128, block_size=block_size).generate([prompts()[4]], 32, num_new=4)[0][0]
    assert found == expected


def test_low_precision_stays_close(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    exact, rough = Driver(load_model(folder)), Driver(load_model(folder, torch.bfloat16))
    rough.kv = rough.kv.bfloat16()
    prompt = prompts()[4]
    [target], [found] = (
        driver.forward([Row(prompt, 0, driver.blocks(len(prompt)), (greedy(),))]) for driver in (exact, rough)
    )
    assert found.dtype == torch.float32
    assert (found - target).abs().max() < 0.1 * target.abs().max()
