"""A trained network as a folder in Hugging Face's format, and back: config, weights, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.model import Network, Shape
from training.tokens import END, SPECIAL_TOKENS, TEMPLATE

_PREFIX = "model."
_SIZES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
"""Fields of ``Shape``, and their names in config.json."""


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes or replaces the files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{_PREFIX}{name}": weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)
    _write(folder / "config.json", _config(network.shape))
    _write(folder / "generation_config.json", {"eos_token_id": END, "pad_token_id": END, "temperature": 0.0})
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL_TOKENS[END],
            "pad_token": SPECIAL_TOKENS[END],
            "model_max_length": network.shape.context,
            "clean_up_tokenization_spaces": False,
        },
    )


def load(folder: Path) -> Network:
    """What ``export`` wrote, to compute with in bfloat16."""
    config = json.loads((folder / "config.json").read_text())
    network = Network(Shape(**{field: config[name] for field, name in _SIZES.items()}))
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name.removeprefix(_PREFIX): weight.float() for name, weight in weights.items()})
    return network


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        **{name: getattr(shape, field) for field, name in _SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END,
    }


def _write(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
