"""A model to measure with where none can be downloaded: real sizes, random weights, a trained tokenizer.

Speed and memory are those of a model of this shape; answers are noise. Any engine that reads Hugging Face's format
loads it. The tokenizer is a byte-level BPE trained on this Python's own library, so that almost every token is whole
text: an answer then streams token by token, as a real one does.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.settings import Shape
from proto.errors import SettingsError

if TYPE_CHECKING:
    import torch

_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
_BEGIN, _END = 0, 1
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_checkpoint(folder: Path, shape: Shape, vocab_size: int, seed: int) -> int:
    """Writes bfloat16 weights, config, tokenizer and chat template; returns the number of parameters. Needs torch.

    Raises SettingsError where ``folder`` has something in it or cannot be written.
    """
    from safetensors.torch import save_file

    _make_empty(folder)
    num_tokens = _write_tokenizer(folder, vocab_size)
    weights = dict(_weights(shape, num_tokens, seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(folder, shape, num_tokens)
    return sum(weight.numel() for weight in weights.values())


def write_description(folder: Path, shape: Shape, vocab_size: int) -> None:
    """The same without weights, for ``--load-format dummy``. The vocabulary may have more than the tokenizer's tokens.

    Raises SettingsError as ``write_checkpoint``.
    """
    _make_empty(folder)
    _write_tokenizer(folder, vocab_size)
    _write_configs(folder, shape, vocab_size)


def _make_empty(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SettingsError(f"{folder} is not empty.")
    except OSError as error:
        raise SettingsError(f"{folder}: {error}") from error


def _write_configs(folder: Path, shape: Shape, num_tokens: int) -> None:
    _write_json(folder / "config.json", _config(shape, num_tokens))
    _write_json(folder / "generation_config.json", {"bos_token_id": _BEGIN, "eos_token_id": _END})


def _config(shape: Shape, num_tokens: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": num_tokens,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.ties_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _BEGIN,
        "eos_token_id": _END,
    }


def _weights(shape: Shape, num_tokens: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and matrices, rows by columns. At a smaller scale than this one, tokens hardly depend on the context."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator).mul_(1.6 / columns**0.5)
        return weight.to(torch.bfloat16)

    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", linear(num_tokens, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        yield f"{prefix}.self_attn.q_proj.weight", linear(query, shape.hidden)
        yield f"{prefix}.self_attn.k_proj.weight", linear(kv, shape.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", linear(kv, shape.hidden)
        yield f"{prefix}.self_attn.o_proj.weight", linear(shape.hidden, query)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
        yield f"{prefix}.mlp.gate_proj.weight", linear(shape.inner, shape.hidden)
        yield f"{prefix}.mlp.up_proj.weight", linear(shape.inner, shape.hidden)
        yield f"{prefix}.mlp.down_proj.weight", linear(shape.hidden, shape.inner)
    yield "model.norm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)
    if not shape.ties_embeddings:
        yield "lm_head.weight", linear(num_tokens, shape.hidden)


def _write_tokenizer(folder: Path, vocab_size: int) -> int:
    """Returns the number of tokens: ``vocab_size``, or fewer if the text has no more to merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_library_texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end = _SPECIAL_TOKENS[_BEGIN], _SPECIAL_TOKENS[_END]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": end}
    _write_json(folder / "tokenizer_config.json", {**about, "chat_template": _CHAT_TEMPLATE})
    return int(tokenizer.get_vocab_size())


def _library_texts() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(library).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
