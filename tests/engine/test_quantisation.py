"""Quantised checkpoints and rounding at load: what the numbers are, which flags fit, and what is named differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import machine
from engine.build import EngineParts, load_engine_parts
from engine.config_file import ConfigFile
from engine.quantisation import Quantisation, Rounding, StoredSource, read_quantisation
from engine.weights import SafetensorsSource
from kernels import dispatch
from kernels.dispatch import REFERENCE
from kernels.quantised import CodedMatrix, Matrix, ScaledMatrix
from kernels.reference import quantised as twins
from proto.errors import CheckpointError, DoesNotFit, SettingsError, UnsupportedModel
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tandem import LLM, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.quantised import FORMATS, four_bits, fp8, int8_rows, is_linear, quantise

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 12, "num_key_value_heads": 4}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
PROMPTS = ["The quick brown fox jumps over the lazy dog", "Numbers: 0 1 2 3", "Grüße"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row of every matrix has no negative numbers: its zero points are 0."""
    folder = make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen2", **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    for key in filter(is_linear, tensors):
        tensors[key][3].abs_()
    save_file(tensors, folder / "model.safetensors")
    return folder


def answers_of(
    folder: Path, *, params: SamplingParams = GREEDY, **settings: Any
) -> list[tuple[list[int], float | None]]:
    """Tokens, and the sum of their log probabilities."""
    common = {"num_gpu_blocks_override": 64, "threads": 1, "skip_warmup": True, "device": "cpu", "dtype": "float32"}
    with LLM(str(folder), **{**common, **settings}) as llm:
        choices = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    return [(choice.token_ids, choice.cumulative_logprob) for choice in choices]


def tokens_of(folder: Path, **settings: Any) -> list[list[int]]:
    return [tokens for tokens, _ in answers_of(folder, **settings)]


def quantisation_of(folder: Path, **settings: Any) -> Quantisation | None:
    return read_quantisation(ConfigFile.load(folder / "config.json"), ModelSettings(**settings))


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> StoredSource:
    scheme = quantisation_of(folder)
    assert scheme is not None
    assert not isinstance(scheme, Rounding)
    return StoredSource(SafetensorsSource(folder, dtype, CPU), scheme)


def parts_of(folder: Path, **settings: Any) -> EngineParts:
    model = ModelSettings(model=str(folder), device="cpu", skip_warmup=True, **{"dtype": "float32", **settings})
    cache, scheduler = CacheSettings(num_gpu_blocks_override=16), SchedulerSettings(max_num_seqs=4)
    parts = load_engine_parts(EngineSettings(model=model, cache=cache, scheduler=scheduler))
    parts.kv.close()
    return parts


# --- what the numbers are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_as_the_numbers_it_stands_for(name: str, plain: Path, tmp_path: Path) -> None:
    quantised, twin = quantise(plain, tmp_path, name)
    source, meant = source_of(quantised), load_file(twin / "model.safetensors")
    for key, weight in meant.items():
        if is_linear(key):
            [matrix] = source.matrices([key.removesuffix(".weight")], (weight.shape[0], weight.shape[1]))
            assert isinstance(matrix, ScaledMatrix | CodedMatrix)
            torch.testing.assert_close(twins.dequantise(matrix, torch.float32), weight, rtol=1e-6, atol=1e-7)
    assert tokens_of(quantised) == tokens_of(twin)


@pytest.mark.parametrize(
    ("settings", "rounded"),
    [
        ({"quantization": "fp8"}, lambda weight: fp8(weight, scale="channel")),
        ({"quantization": "int8"}, int8_rows),
        ({"quantization": "nf4"}, four_bits),
        ({"quantization": "bitsandbytes", "load_format": "bitsandbytes"}, four_bits),
        ({"load_format": "bitsandbytes"}, four_bits),
    ],
    ids=str,
)
def test_rounding_at_load_touches_the_layers_linear_maps_alone(
    settings: dict[str, Any], rounded: Any, plain: Path, tmp_path: Path
) -> None:
    twin = make_checkpoint(tmp_path, "qwen2", **SHAPE)
    tensors = load_file(plain / "model.safetensors")
    save_file({k: rounded(t)[1] if is_linear(k) else t for k, t in tensors.items()}, twin / "model.safetensors")
    assert answers_of(plain, **settings) == answers_of(twin) != answers_of(plain)


def test_what_a_format_leaves_plain_stays_plain(plain: Path, tmp_path: Path) -> None:
    """As modules_to_not_convert and ignore ask for: one of three fused parts, here."""
    quantised, twin = quantise(plain, tmp_path, "awq")
    left_out = "model.layers.0.self_attn.k_proj"
    weight = load_file(plain / "model.safetensors")[f"{left_out}.weight"]
    stored, meant = (load_file(folder / "model.safetensors") for folder in (quantised, twin))
    kept = {key: tensor for key, tensor in stored.items() if not key.startswith(f"{left_out}.") or "bias" in key}
    save_file(kept | {f"{left_out}.weight": weight}, quantised / "model.safetensors")
    save_file(meant | {f"{left_out}.weight": weight}, twin / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    matrices = source_of(quantised).matrices(names, (192 + 2 * 64, 192))
    assert [type(matrix) for matrix in matrices] == [CodedMatrix, Tensor, CodedMatrix]
    assert tokens_of(quantised) == tokens_of(twin)


def test_a_quantised_head_is_read(plain: Path, tmp_path: Path) -> None:
    quantised, twin = quantise(plain, tmp_path, "gptq")
    stored, meant = (load_file(folder / "model.safetensors") for folder in (quantised, twin))
    parts, meant["lm_head.weight"] = FORMATS["gptq"].store(stored.pop("lm_head.weight"))
    head = {f"lm_head.{end}": part.contiguous() for end, part in parts.items()}
    save_file(stored | head, quantised / "model.safetensors")
    save_file(meant, twin / "model.safetensors")
    assert tokens_of(quantised) == tokens_of(twin)


def test_groups_of_compressed_tensors_are_chosen_by_name_then_pattern_then_kind(plain: Path, tmp_path: Path) -> None:
    """Attention in packed 4 bits, the MLP in fp8, one module by its own name in 8 bits."""
    folders = {name: quantise(plain, tmp_path / name, name) for name in ("ct-int4", "ct-fp8", "ct-int8-rows")}
    own = "model.layers.1.self_attn.o_proj"

    def chosen(key: str) -> str:
        return "ct-int8-rows" if key.startswith(own) else "ct-fp8" if ".mlp." in key else "ct-int4"

    mixed, twin = tmp_path / "ct-int4" / "quantised", tmp_path / "ct-int4" / "twin"
    for place in (0, 1):
        files = {name: load_file(both[place] / "model.safetensors") for name, both in folders.items()}
        tensors = {k: t for name, file in files.items() for k, t in file.items() if chosen(k) == name}
        save_file(tensors, (mixed, twin)[place] / "model.safetensors")
    targets = {"ct-int4": ["Linear"], "ct-fp8": ["re:.*mlp.*_proj"], "ct-int8-rows": [own]}
    groups = {}
    for name, wanted in targets.items():
        [group] = FORMATS[name].config["config_groups"].values()
        groups[name] = group | {"targets": wanted}
    section = FORMATS["ct-int4"].config | {"format": "mixed-precision", "config_groups": groups}
    set_section(mixed, section)
    assert tokens_of(mixed) == tokens_of(twin)


def test_dummy_weights_are_rounded_too(plain: Path) -> None:
    settings = {"load_format": "dummy", "seed": 3}
    assert tokens_of(plain, **settings, quantization="nf4") != tokens_of(plain, **settings)


@pytest.mark.parametrize("name", ["awq", "fp8-blocks", "fp8-static", "ct-w8a8"])
def test_what_kernels_multiply_quantised_is_near_to_what_is_multiplied_plain(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: matrices stay quantised, alike ones are fused, and activations may be rounded."""
    quantised, _ = quantise(plain, tmp_path, name)
    without = tokens_of(quantised)
    seen: list[Matrix] = []

    def linear(parts: Any, bias: Tensor | None) -> Any:
        seen.extend(parts)
        return twins.linear(parts, bias)

    monkeypatch.setattr(dispatch, "choose", lambda *asked: replace(REFERENCE, quantised=linear))
    found = tokens_of(quantised)
    assert len(seen) == 2 * 7
    if name == "awq":
        assert found == without
    same = sum(a == b for one, other in zip(found, without, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 12, "random weights: a token that differs changes all that follow"


@pytest.mark.parametrize("name", ["gptq-desc-act", "ct-int8-groups", "bitsandbytes-nf4"])
def test_a_model_runs_on_the_compiled_products(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, where there is no GPU; weights are widened exactly, so the tokens are the same."""
    pytest.importorskip("triton")
    from kernels.triton.quantised import TritonQuantised
    from kernels.triton.runtime import Target

    if torch.cuda.is_available():
        pytest.skip("the kernels' own tests run on the GPU")
    quantised, _ = quantise(plain, tmp_path, name)
    few = replace(GREEDY, max_tokens=3)
    wanted = tokens_of(quantised, params=few)
    products = TritonQuantised(Target(4, is_interpreted=True), torch.float32, REFERENCE.linear)
    kernels = replace(REFERENCE, quantised=products.linear)
    monkeypatch.setattr(dispatch, "choose", lambda *asked: kernels)
    assert tokens_of(quantised, params=few) == wanted


# --- who may hand over to whom ---------------------------------------------------------------------------------------


def test_two_quantisations_of_one_checkpoint_are_two_models(plain: Path, tmp_path: Path) -> None:
    quantised, _ = quantise(plain, tmp_path, "gptq")
    found = {
        "plain": parts_of(plain),
        "fp8": parts_of(plain, quantization="fp8"),
        "nf4": parts_of(plain, quantization="nf4"),
        "gptq": parts_of(quantised),
    }
    set_section(quantised, FORMATS["gptq-v2"].config)
    found["other zero points"] = parts_of(quantised)
    layouts = {name: parts.facts.layout for name, parts in found.items()}
    assert len({layout.fingerprint() for layout in layouts.values()}) == len(found)
    assert len({parts.hasher.full_blocks(list(range(16)))[0] for parts in found.values()}) == len(found)
    assert layouts["fp8"].model_digest.endswith("-fp8")
    assert "-gptq," in layouts["gptq"].describe()
    again = parts_of(plain, quantization="fp8")
    assert again.facts.layout == layouts["fp8"]
    assert again.facts.numerics == found["fp8"].facts.numerics
    numerics = {name: parts.facts.numerics for name, parts in found.items()}
    assert "float32 of fp8 (a scale per row, rounded at load)" in numerics["fp8"]
    assert len({*numerics.values()}) == len(found) - 1, "both GPTQ ones are computed alike"


# --- which flags fit -------------------------------------------------------------------------------------------------


def set_section(folder: Path, section: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("awq", {"quantization": "awq_marlin"}),
        ("gptq", {"quantization": "gptq"}),
        ("ct-fp8", {"quantization": "compressed-tensors"}),
        ("bitsandbytes-nf4", {"load_format": "bitsandbytes"}),
        ("fp8", {"quantization": "none"}),
    ],
)
def test_a_flag_that_says_what_the_checkpoint_says_is_welcome(
    name: str, settings: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    quantised, _ = quantise(plain, tmp_path, name)
    assert quantisation_of(quantised, **settings) == quantisation_of(quantised)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (None, {"quantization": "awq"}, r"needs a checkpoint that was quantised so.*plain.*--quantization fp8, int8"),
        (None, {"quantization": "compressed-tensors"}, r"no quantization_config"),
        ("awq", {"quantization": "fp8"}, r"fp8 does not fit.*awq \(4 bits, groups of 32\) already.*Leave --quant"),
        ("fp8", {"quantization": "gptq_marlin"}, r"gptq does not fit this checkpoint, which is fp8"),
        ("bitsandbytes-int8", {"quantization": "nf4"}, r"which is bitsandbytes \(8 bits\) already"),
        ("awq", {"load_format": "bitsandbytes"}, r"bitsandbytes does not fit"),
        (None, {"load_format": "bitsandbytes", "quantization": "fp8"}, r"contradicts quantization fp8"),
        ("awq", {"load_format": "dummy"}, r"Dummy weights cannot be awq"),
    ],
)
def test_a_wrong_pairing_says_what_the_checkpoint_is_and_what_to_do(
    section: str | None, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path)
    if section:
        set_section(tmp_path, FORMATS[section].config)
    with pytest.raises(SettingsError, match=message):
        load_engine_parts(EngineSettings(model=ModelSettings(model=str(tmp_path), device="cpu", **settings)))


CT = FORMATS["ct-int4"].config


def ct(**group: Any) -> dict[str, Any]:
    [base] = CT["config_groups"].values()
    return CT | {"config_groups": {"group_0": {key: group.get(key, value) for key, value in base.items()}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "exl2"}, r"quantised by exl2 are not supported. Supported: fp8, awq, gptq, bitsandbytes"),
        ({"quant_method": "mxfp4"}, r"mxfp4"),
        ({"bits": 4}, r"an unnamed method"),
        (FORMATS["awq"].config | {"version": "gemv"}, r"AWQ of 4 bits, version gemv.*Supported: 4 bits, version gemm"),
        (FORMATS["awq"].config | {"zero_point": False}, r"without zero points"),
        (FORMATS["gptq"].config | {"bits": 3}, r"GPTQ of 3 bits in format gptq"),
        (FORMATS["gptq"].config | {"checkpoint_format": "marlin"}, r"format marlin"),
        (FORMATS["gptq"].config | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"parameters of their own"),
        (FORMATS["gptq"].config | {"group_size": 0}, r"groups of 0"),
        (FORMATS["fp8-blocks"].config | {"weight_block_size": [64, 64]}, r"blocks of \(64, 64\).*\[128, 128\]"),
        (FORMATS["fp8"].config | {"activation_scheme": "none"}, r"none activations"),
        (CT | {"format": "nvfp4-pack-quantized"}, r"nvfp4-pack-quantized is not supported.*float-quantized"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse"),
        (CT | {"transform_config": {"config_groups": {}}}, r"rotated"),
        (CT | {"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, r"a KV cache of 4-bit int.*--kv-cache-dtype"),
        (ct(weights={"num_bits": 2, "strategy": "channel"}), r"weights of 2-bit int with a scale per channel"),
        (ct(weights={"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}), r"block of 128x128"),
        (ct(weights=None), r"quantise no weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_read_is_refused_before_weights_are_opened(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path)
    set_section(tmp_path, section)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=message):
        load_engine_parts(EngineSettings(model=ModelSettings(model=str(tmp_path), device="cpu")))


def test_scales_for_an_fp8_cache_do_no_harm(plain: Path, tmp_path: Path) -> None:
    quantised, twin = quantise(plain, tmp_path, "ct-fp8")
    set_section(quantised, FORMATS["ct-fp8"].config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert tokens_of(quantised) == tokens_of(twin)


def test_a_config_that_says_quantised_over_plain_weights_is_an_error(plain: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    set_section(tmp_path, FORMATS["awq"].config)
    with pytest.raises(CheckpointError, match=r"says awq .* but no weights are stored so"):
        parts_of(tmp_path)


def test_quantised_weights_without_a_word_in_the_config_are_an_error(plain: Path, tmp_path: Path) -> None:
    for name, message in (
        ("gptq", r"There is .*qweight, which config"),
        ("fp8", r"float8_e4m3fn: quantised, which config"),
    ):
        quantised, _ = quantise(plain, tmp_path / name, name)
        set_section(quantised, None)
        with pytest.raises(CheckpointError, match=message):
            parts_of(quantised)


@pytest.mark.parametrize(
    ("name", "end", "wrong", "message"),
    [
        ("awq", "q_proj.scales", torch.zeros(6, 184), r"q_proj.qweight is torch.int32 \[192, 24\].*\[192, 23\]"),
        ("awq", "q_proj.qzeros", torch.zeros(6, 24), r"qzeros is torch.float32 .*asks for torch.int32"),
        ("gptq-desc-act", "q_proj.g_idx", torch.zeros(192), r"g_idx does not have 32 inputs in every group"),
        ("fp8", "q_proj.weight_scale", torch.zeros(3), r"weight_scale is .*\[3\].* asks for \[\] or \[1\]"),
        ("fp8", "q_proj.weight", torch.zeros(192, 192, dtype=torch.float8_e5m2), r"float8_e5m2"),
        ("bitsandbytes-nf4", "q_proj.weight.quant_state.bitsandbytes__nf4", torch.zeros(4).byte(), r"cannot be read"),
        ("ct-fp8", "down_proj.weight", torch.zeros(64, 320).to(torch.float8_e4m3fn), r"asks for"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, end: str, wrong: Tensor, message: str, plain: Path, tmp_path: Path
) -> None:
    quantised, _ = quantise(plain, tmp_path, name)
    tensors = load_file(quantised / "model.safetensors")
    key = next(key for key in tensors if key.endswith(end))
    save_file(tensors | {key: wrong}, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        parts_of(quantised)


def test_a_missing_tensor_of_a_module_is_named(plain: Path, tmp_path: Path) -> None:
    quantised, _ = quantise(plain, tmp_path, "awq")
    tensors = load_file(quantised / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.scales"):
        parts_of(quantised)


# --- how much memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_memory_foreseen_is_what_matrices_take(name: str, plain: Path, tmp_path: Path) -> None:
    quantised, _ = quantise(plain, tmp_path, name)
    source = source_of(quantised, torch.bfloat16)
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    taken = sum(bytes_of(matrix) for matrix in source.matrices(names, (640, 192)))
    assert taken <= source.num_bytes(names, (640, 192)) <= 1.06 * taken, "zero points that are all the same go"
    assert taken < 0.6 * 640 * 192 * 2


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_the_memory_foreseen_is_what_rounded_matrices_take(kind: str) -> None:
    rounding = read_quantisation(ConfigFile("config.json", {}), ModelSettings(quantization=kind))
    assert isinstance(rounding, Rounding)
    assert rounding.num_bytes(640, 192) == bytes_of(rounding.round(torch.randn(640, 192).bfloat16()))


def bytes_of(matrix: Matrix) -> int:
    tensors = [matrix.values, matrix.scale] if isinstance(matrix, ScaledMatrix) else []
    if isinstance(matrix, CodedMatrix):
        tensors = [tensor for tensor in (matrix.codes, matrix.scale, matrix.zero) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)


def test_weights_that_fit_only_quantised(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they take the room of plain ones, and the message says of what."""
    num_parameters = sum(tensor.numel() for tensor in load_file(plain / "model.safetensors").values())
    monkeypatch.setattr(machine, "available_memory", lambda device: 3 * num_parameters)
    with pytest.raises(DoesNotFit, match=r"x 4 bytes \(float32 of nf4 \(groups of 64, rounded at load\)\)"):
        parts_of(plain, quantization="nf4")
    kernels = replace(REFERENCE, quantised=twins.linear)
    monkeypatch.setattr(dispatch, "choose", lambda *asked: kernels)
    parts = parts_of(plain, quantization="nf4")
    assert "; nf4 (groups of 64, rounded at load), the rest float32" in parts.facts.numerics
    monkeypatch.setattr(machine, "available_memory", lambda device: num_parameters)
    with pytest.raises(DoesNotFit, match=r"x 1\.\d+ bytes \(nf4 .*, the rest float32\)"):
        parts_of(plain, quantization="nf4")
