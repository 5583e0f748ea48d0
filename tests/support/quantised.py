"""Checkpoints as the tools of their formats write them, and the plain checkpoints that they stand for.

Packed number by number as the formats describe it; nothing here shares code with what reads them. Numbers are rounded
to the nearest, without calibration.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors by the end of their names, and the matrix (float32) they stand for."""

GROUP = 32


@dataclass(frozen=True)
class Format:
    """``config`` is the checkpoint's quantization_config; ``store`` writes one weight ``[out, in]``."""

    config: dict[str, Any]
    store: Callable[[Tensor], Stored]


def quantise(plain: Path, directory: Path, name: str) -> tuple[Path, Path]:
    """The checkpoint ``plain`` in the format ``name``, and a plain one with the numbers of that."""
    form = FORMATS[name]
    quantised, twin = directory / "quantised", directory / "twin"
    for folder in (quantised, twin):
        shutil.copytree(plain, folder)
    config = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        if not is_linear(key):
            stored[key] = meant[key] = tensor
            continue
        parts, meant[key] = form.store(tensor.float())
        stored |= {key.removesuffix("weight") + end: part.clone().contiguous() for end, part in parts.items()}
    save_file(stored, quantised / "model.safetensors")
    save_file(meant, twin / "model.safetensors")
    return quantised, twin


def is_linear(key: str) -> bool:
    return ".layers." in key and key.endswith("proj.weight")


# --- words of 32 bits ------------------------------------------------------------------------------------------------


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes ``[n, m]`` in words along the second dimension; ``order``: the code that goes first, second, ..."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    packed = np.zeros((codes.shape[0], padded.shape[1] // per_word), dtype=np.uint32)
    for column in range(packed.shape[1]):
        for place, code in enumerate(order or range(per_word)):
            packed[:, column] |= padded[:, column * per_word + code].astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(packed.view(np.int32))


@dataclass(frozen=True)
class Integers:
    """``codes [out, in]`` with ``scale`` and ``zero [out, groups]``; ``group_of [in]``."""

    codes: np.ndarray
    scale: Tensor
    zero: np.ndarray
    group_of: np.ndarray

    def meant(self) -> Tensor:
        zero, scale = self.zero[:, self.group_of], self.scale.float()[:, self.group_of]
        return torch.from_numpy((self.codes - zero).astype(np.float32)) * scale


def integers(weight: Tensor, bits: int, group: int, *, symmetric: bool, shuffled: bool = False) -> Integers:
    """``group`` -1: a whole row. ``shuffled``: which inputs make a group is drawn."""
    rows, columns = weight.shape
    size = columns if group == -1 else group
    group_of = np.arange(columns) // size
    if shuffled:
        group_of = np.random.default_rng(3).permutation(group_of)
    groups, largest = math.ceil(columns / size), 2**bits - 1
    codes = np.zeros((rows, columns), dtype=np.int64)
    scale, zero = torch.zeros(rows, groups, dtype=torch.float16), np.zeros((rows, groups), dtype=np.int64)
    for index in range(groups):
        inside = np.flatnonzero(group_of == index)
        part = weight[:, inside]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale[:, index] = ((high - low) / largest).clamp(min=1e-6).half()
        step = scale[:, index].float().numpy()
        zero[:, index] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low.numpy() / step), 0, largest)
        codes[:, inside] = np.clip(np.round(part.numpy() / step[:, None]) + zero[:, index, None], 0, largest)
    return Integers(codes, scale, zero, group_of)


def awq(weight: Tensor) -> Stored:
    """AutoAWQ's WQLinear_GEMM: words along the outputs, in its order."""
    made = integers(weight, 4, GROUP, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": words(made.codes.T, 4, order), "qzeros": words(made.zero.T, 4, order), "scales": made.scale.T}
    return stored, made.meant()


def gptq(
    weight: Tensor,
    *,
    bits: int = 4,
    group: int = GROUP,
    symmetric: bool = False,
    shuffled: bool = False,
    offset: int = 1,
) -> Stored:
    """AutoGPTQ's QuantLinear: words along the inputs; version 1 (``offset`` 1) subtracts one from each
    zero point of a word at once."""
    made = integers(weight, bits, group, symmetric=symmetric, shuffled=shuffled)
    ones = int("".join("1".zfill(bits // 4) for _ in range(32 // bits)), 16)
    stored = {
        "qweight": words(made.codes, bits).T,
        "qzeros": words(made.zero.T, bits) - offset * ones,
        "scales": made.scale.T,
        "g_idx": torch.from_numpy(made.group_of).int(),
    }
    return stored, made.meant()


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def packed(
    weight: Tensor, *, bits: int = 4, group: int = GROUP, symmetric: bool = True, shuffled: bool = False
) -> Stored:
    """pack-quantized: words along the inputs, zero points along the outputs."""
    made = integers(weight, bits, group, symmetric=symmetric, shuffled=shuffled)
    stored = {
        "weight_packed": words(made.codes, bits),
        "weight_scale": made.scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(made.zero.T, bits).T
    if shuffled:
        stored["weight_g_idx"] = torch.from_numpy(made.group_of).int()
    return stored, Integers(made.codes, made.scale.bfloat16(), made.zero, made.group_of).meant()


def signed(weight: Tensor, *, group: int = -1, symmetric: bool = True) -> Stored:
    """int-quantized, naive-quantized: int8 as it is."""
    made = integers(weight, 8, group, symmetric=symmetric)
    stored = {"weight": torch.from_numpy(made.codes - 128).to(torch.int8), "weight_scale": made.scale}
    if not symmetric:
        stored["weight_zero_point"] = torch.from_numpy(made.zero - 128).to(torch.int8)
    return stored, made.meant()


# --- fp8 -------------------------------------------------------------------------------------------------------------


def fp8(weight: Tensor, *, scale: str, name: str = "weight_scale", input_scale: bool = False) -> Stored:
    """``scale``: one per "tensor", "channel" or "block" of 128x128."""
    if scale == "tensor":
        factor = (weight.abs().amax() / 448).reshape(())
        spread = factor
    elif scale == "channel":
        factor = weight.abs().amax(1, keepdim=True) / 448
        spread = factor
    else:
        rows, columns = (math.ceil(size / 128) for size in weight.shape)
        factor, spread = torch.zeros(rows, columns), torch.zeros_like(weight)
        for row in range(rows):
            for column in range(columns):
                block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                factor[row, column] = weight[block].abs().amax() / 448
                spread[block] = factor[row, column]
    values = (weight / spread).to(torch.float8_e4m3fn)
    stored = {"weight": values, name: factor}
    if input_scale:
        stored["input_scale"] = torch.tensor(0.02)
    return stored, values.float() * spread


# --- bitsandbytes ----------------------------------------------------------------------------------------------------

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0, 0.0052083333, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25]
FP4 += [-number for number in FP4]


def four_bits(weight: Tensor, *, kind: str = "nf4", nested: bool = False) -> Stored:
    """Params4bit: blocks of 64 of the flattened weight, the first code of a byte in its upper half."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    codes = ((blocks / largest[:, None])[:, :, None] - table).abs().argmin(-1).flatten().to(torch.uint8)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    end = f"weight.quant_state.bitsandbytes__{kind}"
    stored = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": table}
    if nested:
        offset = float(largest.mean())
        outer, second = _second_round(largest - offset)
        stored |= {"weight.absmax": outer, "weight.nested_absmax": second, "weight.nested_quant_map": _LEVELS}
        largest = _LEVELS[outer.long()] * second.repeat_interleave(256)[: len(outer)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        stored["weight.absmax"] = largest
    stored[end] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored, (table[codes.long()].view(-1, 64) * largest[:, None]).view(weight.shape)


_LEVELS = torch.linspace(-1, 1, 256)


def _second_round(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``_LEVELS``, and the largest number of every 256."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    largest = blocks.abs().amax(1)
    nearest = ((blocks / largest[:, None])[:, :, None] - _LEVELS).abs().argmin(-1)
    return nearest.flatten()[: len(values)].to(torch.uint8), largest


def eight_bits(weight: Tensor) -> Stored:
    """Int8Params: SCB is the largest number of a row."""
    largest = weight.abs().amax(1)
    values = torch.round(weight * (127 / largest)[:, None]).to(torch.int8)
    return {"weight": values, "SCB": largest}, values.float() * (largest / 127)[:, None]


def int8_rows(weight: Tensor) -> Stored:
    """No format: what rounding at load makes, halves upwards."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = torch.floor(weight / scale + 0.5)
    return {"weight": values.to(torch.int8), "scale": scale}, values * scale


# --- all of them -----------------------------------------------------------------------------------------------------


def _gptq_config(**more: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    return base | {"checkpoint_format": "gptq"} | more


def _ct_config(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    base = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": base | weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_PER_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
_GROUPED = {"strategy": "group", "group_size": GROUP}
_FLOAT = {"type": "float"}
_BLOCKS = {"strategy": "block", "block_structure": [128, 128]}

FORMATS = {
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "gptq": Format(_gptq_config(sym=True), lambda w: gptq(w, symmetric=True)),
    "gptq-asymmetric": Format(_gptq_config(), gptq),
    "gptq-v2": Format(_gptq_config(checkpoint_format="gptq_v2"), lambda w: gptq(w, offset=0)),
    "gptq-desc-act": Format(_gptq_config(desc_act=True), lambda w: gptq(w, shuffled=True)),
    "gptq-8-bit-rows": Format(_gptq_config(bits=8, group_size=-1), lambda w: gptq(w, bits=8, group=-1)),
    "fp8": Format({"quant_method": "fp8", "activation_scheme": "dynamic"}, lambda w: fp8(w, scale="tensor")),
    "fp8-static": Format(
        {"quant_method": "fp8", "activation_scheme": "static"}, lambda w: fp8(w, scale="tensor", input_scale=True)
    ),
    "fp8-blocks": Format(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        lambda w: fp8(w, scale="block", name="weight_scale_inv"),
    ),
    "bitsandbytes-nf4": Format({"quant_method": "bitsandbytes", "load_in_4bit": True}, four_bits),
    "bitsandbytes-double": Format(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        lambda w: four_bits(w, nested=True),
    ),
    "bitsandbytes-fp4": Format({"load_in_4bit": True}, lambda w: four_bits(w, kind="fp4")),
    "bitsandbytes-int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits),
    "ct-int4": Format(_ct_config("pack-quantized", {"num_bits": 4, **_GROUPED}), packed),
    "ct-int4-asymmetric": Format(
        _ct_config("pack-quantized", {"num_bits": 4, "symmetric": False, **_GROUPED}),
        lambda w: packed(w, symmetric=False),
    ),
    "ct-int4-actorder": Format(
        _ct_config("pack-quantized", {"num_bits": 4, "actorder": "group", **_GROUPED}),
        lambda w: packed(w, shuffled=True),
    ),
    "ct-int8-rows": Format(_ct_config("pack-quantized", {}), lambda w: packed(w, bits=8, group=-1)),
    "ct-w8a8": Format(_ct_config("int-quantized", {}, _PER_TOKEN | {"type": "int"}), signed),
    "ct-int8-asymmetric": Format(
        _ct_config("int-quantized", {"symmetric": False}), lambda w: signed(w, symmetric=False)
    ),
    "ct-int8-groups": Format(_ct_config("naive-quantized", _GROUPED), lambda w: signed(w, group=GROUP)),
    "ct-fp8": Format(_ct_config("float-quantized", _FLOAT, _PER_TOKEN | _FLOAT), lambda w: fp8(w, scale="channel")),
    "ct-fp8-static": Format(
        _ct_config("float-quantized", _FLOAT | {"strategy": "tensor"}, _FLOAT | {"strategy": "tensor"}),
        lambda w: fp8(w, scale="tensor", input_scale=True),
    ),
    "ct-fp8-blocks": Format(
        _ct_config("float-quantized", _FLOAT | _BLOCKS, _PER_TOKEN | _FLOAT | {"strategy": "group"}),
        lambda w: fp8(w, scale="block"),
    ),
}
