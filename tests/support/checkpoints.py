"""Tiny random checkpoints in Hugging Face's format, made in milliseconds and without importing `transformers`.

Random weights serve exactness and plumbing. Matrices are drawn with a standard deviation of 1.6 / sqrt(fan_in): at the
usual 0.02 the next token hardly depends on the context, and errors hide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
BEGIN, END = 0, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = """
A router takes requests, a prefill worker reads the prompt, and a decode worker writes the answer, one token at a time.
The quick brown fox jumps over the lazy dog; pack my box with five dozen jugs of liquor, said the black quartz.
Once upon a time there was a block of memory that travelled from one worker to another, and every byte of it arrived.
Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000. Punctuation: . , ; : ! ? ( ) [ ] { } " ' - _ = + * / \\ < > & % $ # @
{"name": "value", "list": [1, 2, 3], "nested": {"true": true, "null": null}} Grüße, naïve café, 你好, 😀.
"""

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "attention_bias": False},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 24,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
}
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "initializer_range": 0.02,
}


@cache
def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 320 tokens; ids 0 to 4 are ``SPECIAL_TOKENS``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    num_shards: int = 1,
    generation_config: Mapping[str, Any] | None = None,
    poison: int | None = None,
    poison_with: float = math.inf,
    **overrides: Any,
) -> Path:
    """Writes config, weights, tokenizer, chat template and generation config; returns ``directory``.

    ``family``: llama, mistral, qwen2, qwen3 or gemma2. ``overrides`` are entries of config.json (``None`` is written as
    null), such as ``num_hidden_layers``, ``rope_scaling``, ``sliding_window``, ``vocab_size`` (default: the
    tokenizer's). ``poison``: a token whose embedding is ``poison_with``, and that the model never says by itself (of a
    family whose embeddings are its own).
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config(family, dtype=dtype, **overrides)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BEGIN, "eos_token_id": END} | dict(generation_config or {}),
    )
    _write_tokenizer(directory)
    weights = _make_weights(config, seed, getattr(torch, dtype))
    if poison is not None:
        weights["model.embed_tokens.weight"][poison] = poison_with
        weights["lm_head.weight"][poison] = 0.0
    _write_weights(directory, weights, num_shards)
    return directory


def make_config(family: str = "llama", *, dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """The entries of config.json for ``family`` with ``overrides``."""
    base = {"model_type": family, "torch_dtype": dtype, "vocab_size": make_tokenizer().get_vocab_size()}
    return base | _SHAPE | _FAMILIES[family] | overrides


def _make_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    family = config["model_type"]
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    o_bias = family != "qwen2" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    weights: dict[str, torch.Tensor] = {}

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        weights[f"{name}.weight"] = normal(rows, columns, std=1.6 / math.sqrt(columns))
        if bias:
            weights[f"{name}.bias"] = normal(rows, std=0.2)

    def norm(name: str, size: int) -> None:
        around = 0 if family == "gemma2" else 1
        weights[f"{name}.weight"] = (around + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    linear("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm", hidden)
        linear(f"{prefix}.self_attn.q_proj", query, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.k_proj", kv, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.v_proj", kv, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, query, o_bias)
        if family == "qwen3":
            norm(f"{prefix}.self_attn.q_norm", head_dim)
            norm(f"{prefix}.self_attn.k_norm", head_dim)
        norm(f"{prefix}.post_attention_layernorm", hidden)
        if family == "gemma2":
            norm(f"{prefix}.pre_feedforward_layernorm", hidden)
            norm(f"{prefix}.post_feedforward_layernorm", hidden)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return weights


def _write_weights(directory: Path, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        part = {name: weights[name] for name in names[shard::num_shards]}
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_tokenizer(directory: Path) -> None:
    make_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BEGIN],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[END],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
