"""Reading config.json: defaults, both rope spellings, windows, and refusals that say what is supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config_file import ConfigFile
from engine.families import ModelSpec, read_eos, read_spec
from proto.errors import CheckpointError, UnsupportedModel
from tests.support.checkpoints import make_config


def read(family: str = "llama", **overrides: Any) -> ModelSpec:
    entries = {key: value for key, value in make_config(family, **overrides).items() if value != "absent"}
    return read_spec(ConfigFile("config.json", entries))


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        read(architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModel, match="none named"):
        read(architectures="absent")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope.*Supported: default, linear"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
    ],
)
def test_features_we_lack_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": "absent"}, "has no hidden_size"),
        ({"hidden_size": "64k"}, "hidden_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"rms_norm_eps": "tiny"}, "a number"),
        ({"architectures": [3]}, "a list of strings"),
    ],
)
def test_wrong_entries_name_file_and_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read(**overrides)


def test_defaults() -> None:
    spec = read(head_dim="absent", num_key_value_heads="absent", rms_norm_eps="absent", tie_word_embeddings="absent")
    assert (spec.head_dim, spec.kv_heads, spec.norm_eps, spec.tie_embeddings) == (16, 4, 1e-6, False)
    assert read("qwen3", head_dim="absent").head_dim == 128
    assert read("mistral", sliding_window="absent").windows == (4096, 4096)
    assert read("mistral", sliding_window=None).windows == (None, None)


def test_windows_per_layer() -> None:
    assert read("qwen2", sliding_window=8, max_window_layers=1).windows == (None, None)
    assert read("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1).windows == (None, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert read("qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds).windows == (8, None)
    with pytest.raises(CheckpointError, match="2 entries for 3 layers"):
        read("qwen3", use_sliding_window=True, layer_types=kinds, num_hidden_layers=3)


def test_gemma2_slides_in_every_second_layer_and_caps_its_scores() -> None:
    names = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation")
    usual = read("gemma2", sliding_window="absent", num_hidden_layers=3, **dict.fromkeys(names, "absent"))
    assert usual.windows == (4096, None, 4096)
    assert (usual.attention_soft_cap, usual.logit_soft_cap) == (50.0, 30.0)
    assert (usual.attention_scale, usual.embedding_scale, usual.norm_offset) == (1 / 16, 8.0, 1.0)
    assert (usual.activation, usual.tie_embeddings, usual.has_post_norms) == ("gelu_pytorch_tanh", True, True)
    other = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=7, query_pre_attn_scalar=64)
    assert (other.attention_soft_cap, other.logit_soft_cap, other.attention_scale) == (None, 7.0, 1 / 8)
    assert read("gemma2", layer_types=["full_attention", "sliding_attention"]).windows == (None, 24)


def test_families_differ_where_they_should() -> None:
    llama, qwen2, qwen3 = read(), read("qwen2"), read("qwen3")
    assert (llama.qkv_bias, llama.o_bias, llama.qk_norm) == (False, False, False)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert (llama.attention_soft_cap, llama.norm_offset, llama.attention_scale) == (None, 0.0, 1 / 4)
    biased = read(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_both_rope_spellings_read_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = read(rope_theta="absent", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old.rope == older.rope == new.rope
    assert read(rope_theta=7.0).rope.theta == 7.0
    assert read(rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope.theta == 7.0


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 1024),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1024),
    ],
)
def test_the_longest_context_includes_scaling(scaling: dict[str, Any] | None, expected: int) -> None:
    assert read(rope_scaling=scaling).max_context == expected


def test_eos_of_both_files_in_order() -> None:
    config = ConfigFile("config.json", {"eos_token_id": 7})
    assert read_eos(config, None) == (7,)
    assert read_eos(config, ConfigFile("generation_config.json", {"eos_token_id": [9, 7]})) == (7, 9)
    assert read_eos(ConfigFile("config.json", {"eos_token_id": None}), None) == ()
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read_eos(ConfigFile("config.json", {"eos_token_id": "</s>"}), None)


def test_files_that_are_no_json_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ConfigFile.load(path)
    for text in ("[1]", "{"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            ConfigFile.load(path)
