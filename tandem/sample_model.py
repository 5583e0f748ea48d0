"""The stand-in served when no model is named: a small Llama with seeded random weights, written on the spot.

Its answers are noise. It shows that everything works, and how fast, without a download. Weights are bfloat16, about
3 million; tokens are single bytes, so it needs no tokenizer training and is the same on every machine.

Random weights would end every answer with noise from all 256 bytes. Instead the first hidden channel is a constant that
no layer writes, and the output weights on it lift printable ASCII and lower the rest: noise, but legible.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from proto.settings import EngineSettings

if TYPE_CHECKING:
    import numpy as np

NAME = "tandem-sample"
"""The name clients use for it."""

NOTICE = (
    "No model was named: serving a tiny model with random weights, made on this machine. Its answers are noise; "
    "give a folder or hub name to serve your own."
)

_FOLDER = "sample-model-1"
"""Changes with the content, so that an old cache is never mistaken for the new model."""

_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_BEGIN, _END = 0, 1
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 256 + len(_SPECIAL_TOKENS),
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": _BEGIN,
    "eos_token_id": _END,
}
_CONSTANT = 8.0
_LIFT = 4.0


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where we keep what can be made again: TANDEM_CACHE, else ``tandem`` in the user's cache folder."""
    given = environ.get("TANDEM_CACHE")
    return Path(given) if given else Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def sample_model(cache: Path) -> Path:
    """The sample model's folder under ``cache``, written first if it is not there. Needs numpy.

    May be called by several processes at once: each writes its own copy, and the first to finish wins.
    """
    folder = cache / _FOLDER
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=cache))
    try:
        write_sample_model(draft)
        draft.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster: its copy is the same
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def with_some_model(engine: EngineSettings, environ: Mapping[str, str] = os.environ) -> EngineSettings:
    """``engine``; where it names no model, with the sample model, which is written if need be."""
    if engine.model.model is not None:
        return engine
    folder = str(sample_model(cache_folder(environ)))
    names = engine.model.served_model_name or (NAME,)
    return replace(engine, model=replace(engine.model, model=folder, served_model_name=names))


def write_sample_model(folder: Path) -> None:
    """Writes config, weights, tokenizer and chat template into the empty ``folder``."""
    _write_safetensors(folder / "model.safetensors", _weights())
    _tokenizer_file(folder / "tokenizer.json")
    begin, end = _SPECIAL_TOKENS[_BEGIN], _SPECIAL_TOKENS[_END]
    _write_json(folder / "config.json", _CONFIG)
    _write_json(folder / "generation_config.json", {"bos_token_id": _BEGIN, "eos_token_id": _END})
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": end},
    )
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _weights() -> dict[str, np.ndarray]:
    """float32 weights, rows by columns as Hugging Face stores them."""
    import numpy as np

    # RandomState's stream is frozen by NumPy's compatibility policy; newer generators may change between versions.
    random = np.random.RandomState(20260101)
    vocab, hidden, inner = 256 + len(_SPECIAL_TOKENS), 256, 688
    query, kv = 8 * 32, 4 * 32

    def linear(rows: int, columns: int) -> np.ndarray:
        return np.asarray(random.standard_normal((rows, columns)) * 1.6 / columns**0.5, np.float32)

    def writing_linear(columns: int) -> np.ndarray:
        weight = linear(hidden, columns)
        weight[0] = 0.0
        return weight

    ones = np.ones(hidden, np.float32)
    embedding = linear(vocab, hidden) * 4
    embedding[:, 0] = _CONSTANT
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.self_attn.q_proj.weight": linear(query, hidden),
            f"{prefix}.self_attn.k_proj.weight": linear(kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": linear(kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": writing_linear(query),
            f"{prefix}.post_attention_layernorm.weight": ones,
            f"{prefix}.mlp.gate_proj.weight": linear(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": linear(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": writing_linear(inner),
        }
    head = linear(vocab, hidden)
    head[:, 0] = [_LIFT if _is_printable(token) else -_LIFT for token in range(vocab)]
    return weights | {"model.norm.weight": ones, "lm_head.weight": head}


def _is_printable(token: int) -> bool:
    return 0x20 <= token - len(_SPECIAL_TOKENS) < 0x7F


def _write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """The format is a length, a JSON header padded to 8 bytes, and the tensors; numpy's own bindings lack bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, weight in weights.items():
        end = offset + 2 * weight.size
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(_bfloat16(weight))


def _bfloat16(weight: np.ndarray) -> bytes:
    """Rounded to the nearest bfloat16, ties to even, little-endian."""
    import numpy as np

    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype("<u2").tobytes()


def _tokenizer_file(path: Path) -> None:
    """One token per byte: id 5 + b is byte b. The specials come first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate(_SPECIAL_TOKENS)}
    vocab |= {_byte_letter(byte): len(_SPECIAL_TOKENS) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    tokenizer.save(str(path))


def _byte_letter(byte: int) -> str:
    """The visible letter that stands for a byte in byte-level vocabularies: itself, or one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in visible:
        return chr(byte)
    hidden = [other for other in range(256) if other not in visible]
    return chr(0x100 + hidden.index(byte))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
