"""Model families as readings of config.json: each turns a checkpoint's entries into the one ``ModelSpec``.

Defaults are those that ``transformers`` gives an entry that a file leaves out. Knows names and numbers; knows nothing
of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.config_file import ConfigFile
from engine.rope import KINDS, RopeSpec, yarn_attention_factor
from proto.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder. ``windows`` has an entry per layer: the sliding window in tokens, or None for full attention.

    ``attention_scale`` multiplies queries times keys, ``embedding_scale`` the embeddings. ``norm_offset`` is added to
    the weights of norms. With ``has_post_norms`` what attention and MLP give is normed before it is added to the
    residual stream. Soft caps: of attention's scores, and of the logits.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: RopeSpec
    norm_eps: float
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_position: int
    attention_scale: float
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    has_post_norms: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def max_context(self) -> int:
        """The longest sequence in tokens the model is made for, rope scaling included."""
        if self.rope.kind == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return int(self.max_position * self.rope.context_factor)


def read_spec(config: ConfigFile) -> ModelSpec:
    """Raises UnsupportedModel for an architecture or a feature we do not have, CheckpointError for wrong entries."""
    names = config.texts("architectures") if config.has("architectures") else []
    if len(names) != 1 or names[0] not in FAMILIES:
        raise UnsupportedModel(
            f"{config.name}: architecture {', '.join(names) or '(none named)'} is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[names[0]](names[0], config)


def read_eos(config: ConfigFile, generation: ConfigFile | None) -> tuple[int, ...]:
    """Every token id that ends a text, of config.json and then of generation_config.json."""
    ids = config.ids("eos_token_id") + (generation.ids("eos_token_id") if generation else ())
    return tuple(dict.fromkeys(ids))


def _llama(name: str, config: ConfigFile) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _spec(
        name,
        config,
        windows=_same_window(config, None),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _mistral(name: str, config: ConfigFile) -> ModelSpec:
    default = None if config.states("sliding_window") else 4096
    window = config.whole("sliding_window") if config.has("sliding_window") else default
    return _spec(name, config, windows=_same_window(config, window))


def _qwen2(name: str, config: ConfigFile) -> ModelSpec:
    return _spec(name, config, windows=_qwen_windows(config), qkv_bias=True)


def _qwen3(name: str, config: ConfigFile) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    head_dim = config.whole("head_dim", 128)
    return _spec(
        name, config, windows=_qwen_windows(config), head_dim=head_dim, qkv_bias=bias, o_bias=bias, qk_norm=True
    )


def _gemma2(name: str, config: ConfigFile) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    spec = _spec(
        name,
        config,
        windows=_gemma2_windows(config),
        head_dim=config.whole("head_dim", 256),
        activation=config.text("hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        tie_embeddings=config.flag("tie_word_embeddings", True),
    )
    return replace(
        spec,
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping", 50.0),
        logit_soft_cap=_soft_cap(config, "final_logit_softcapping", 30.0),
        embedding_scale=spec.hidden_size**0.5,
        norm_offset=1.0,
        has_post_norms=True,
    )


FAMILIES: dict[str, Callable[[str, ConfigFile], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
}


def _spec(
    name: str,
    config: ConfigFile,
    *,
    windows: tuple[int | None, ...],
    head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    activation: str | None = None,
    tie_embeddings: bool | None = None,
) -> ModelSpec:
    """What every family shares."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    kv_heads = config.whole("num_key_value_heads", heads)
    if not heads or not kv_heads or heads % kv_heads:
        raise CheckpointError(f"{config.name}: {heads} attention heads cannot share {kv_heads} key/value heads.")
    max_position = config.whole("max_position_embeddings", 2048)
    head_dim = head_dim or config.whole("head_dim", hidden // heads)
    return ModelSpec(
        architecture=name,
        vocab_size=config.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.whole("intermediate_size"),
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=windows,
        rope=_read_rope(config, max_position),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=activation or config.text("hidden_act", "silu"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_embeddings=config.flag("tie_word_embeddings", False) if tie_embeddings is None else tie_embeddings,
        max_position=max_position,
        attention_scale=head_dim**-0.5,
    )


def _same_window(config: ConfigFile, window: int | None) -> tuple[int | None, ...]:
    return (window,) * config.whole("num_hidden_layers")


def _qwen_windows(config: ConfigFile) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on slide, where sliding is on at all; ``layer_types`` overrules."""
    num_layers = config.whole("num_hidden_layers")
    if not config.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = config.whole("sliding_window", 4096)
    if config.has("layer_types"):
        return _typed_windows(config, window)
    first = config.whole("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _gemma2_windows(config: ConfigFile) -> tuple[int | None, ...]:
    """Every second layer slides, the first one too; ``layer_types`` overrules."""
    window = config.whole("sliding_window", 4096)
    if config.has("layer_types"):
        return _typed_windows(config, window)
    return tuple(None if layer % 2 else window for layer in range(config.whole("num_hidden_layers")))


def _typed_windows(config: ConfigFile, window: int) -> tuple[int | None, ...]:
    num_layers, kinds = config.whole("num_hidden_layers"), config.texts("layer_types")
    if len(kinds) != num_layers:
        raise CheckpointError(f"{config.name}: layer_types has {len(kinds)} entries for {num_layers} layers.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _soft_cap(config: ConfigFile, key: str, default: float) -> float | None:
    """None where the file says null."""
    return config.number(key, default) if config.has(key) or not config.states(key) else None


def _read_rope(config: ConfigFile, max_position: int) -> RopeSpec:
    """Both spellings: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters`` with everything inside."""
    theta = config.number("rope_theta", 10000.0)
    scaling = config.section("rope_scaling") or config.section("rope_parameters")
    if scaling is None:
        return RopeSpec(theta=theta, original_max_position=max_position)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    theta = scaling.number("rope_theta", theta)
    if kind not in KINDS:
        raise UnsupportedModel(f"{scaling.name}: rope type {kind!r} is not supported. Supported: {', '.join(KINDS)}.")
    if scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel(f"{scaling.name}: partial rotary embeddings are not supported.")
    if kind == "default":
        return RopeSpec(theta=theta, original_max_position=max_position)
    if kind in ("linear", "dynamic"):
        return RopeSpec(kind=kind, theta=theta, factor=scaling.number("factor"), original_max_position=max_position)
    original = config.whole(
        "original_max_position_embeddings", scaling.whole("original_max_position_embeddings", max_position)
    )
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=scaling.number("factor"),
            original_max_position=original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    factor = scaling.number("factor", max_position / original)
    inferred = yarn_attention_factor(
        factor, scaling.optional_number("mscale"), scaling.optional_number("mscale_all_dim")
    )
    return RopeSpec(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=scaling.number("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0) or 1.0,
        attention_factor=scaling.number("attention_factor", inferred),
        truncate=scaling.flag("truncate", True),
    )
