"""Checkpoints of compressed-tensors (llm-compressor): packed integers of 4 or 8 bits, fp8, or int8.

Groups of its config name the modules they are for. What a group says of activations is what its weights bear:
activations of 8 bits with a scale per token, or a fixed one, are multiplied so where a kernel can; all others, and
those with zero points, stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from engine.config_file import ConfigFile
from engine.quantisation.packed import codes_of, group_order, grouped
from engine.quantisation.scheme import Store, bytes_of_coded, bytes_of_scaled, scaled, shaped
from kernels.quantised import FP8, CodedMatrix, Matrix, ScaledMatrix
from proto.errors import CheckpointError, UnsupportedModel

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")


class Inputs(Enum):
    """How activations are quantised."""

    PLAIN = "16-bit"
    PER_TOKEN = "8-bit, a scale per token"
    FIXED = "8-bit, a fixed scale"


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups. ``group_size`` 0: a scale per row or matrix; ``block``: a scale per block."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    group_size: int
    block: tuple[int, int] | None
    is_symmetric: bool
    inputs: Inputs

    def describe(self) -> str:
        sharing = f"groups of {self.group_size}" if self.group_size else "a scale per row or matrix"
        if self.block is not None:
            sharing = f"blocks of {self.block[0]}x{self.block[1]}"
        return f"{'fp8' if self.is_float else f'int{self.bits}'}, {sharing}, activations {self.inputs.value}"


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    groups: tuple[Group, ...]
    name: str = "compressed-tensors"

    def describe(self) -> str:
        return f"compressed-tensors ({'; '.join(group.describe() for group in self.groups)})"

    def covers(self, store: Store, module: str) -> bool:
        return store.has(f"{module}.weight_packed") or store.kind(f"{module}.weight") in ("I8", "F8_E4M3")

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        group = self._group_of(module)
        if group.group_size or group.bits == 4 or not group.is_symmetric:
            size = group.group_size or columns
            return bytes_of_coded(rows, columns, group.bits, size, has_zeros=not group.is_symmetric)
        return bytes_of_scaled(rows, columns, group.block)

    def matrix(self, store: Store, module: str, columns: int) -> Matrix:
        group = self._group_of(module)
        if store.has(f"{module}.weight_packed"):
            return _unpacked(store, module, columns, group)
        values = shaped(store, f"{module}.weight", FP8 if group.is_float else torch.int8, (-1, columns))
        if group.group_size or not group.is_symmetric:
            return _grouped(store, module, values, group)
        return _scaled(store, module, values, group)

    def _group_of(self, module: str) -> Group:
        """By the module's own name first, then by a pattern, then as a linear map."""
        for fits in (_names, _matches, _means_all):
            for group in self.groups:
                if any(fits(target, module) for target in group.targets):
                    return group
        raise CheckpointError(f"quantization_config has no group for {module}, whose weights are quantised.")


def read(config: ConfigFile) -> CompressedTensors:
    """The section quantization_config. Raises UnsupportedModel for what cannot be multiplied here."""
    stated = config.text("format", "dense")
    if stated not in _FORMATS:
        raise UnsupportedModel(
            f"{config.name}: format {stated} is not supported. Supported: {', '.join(_FORMATS[:4])}, in any mixture."
        )
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise UnsupportedModel(f"{sparsity.name}: sparse weights are not supported; use a dense checkpoint.")
    if config.section("transform_config") is not None:
        raise UnsupportedModel(f"{config.name}: weights that were rotated (transform_config) are not supported.")
    _check_kv_scheme(config)
    groups = config.section("config_groups")
    if groups is None:
        raise CheckpointError(f"{config.name} has no config_groups.")
    return CompressedTensors(tuple(_read_group(group) for group in groups.sections().values()))


def _check_kv_scheme(config: ConfigFile) -> None:
    """Scales for an fp8 cache do no harm: --kv-cache-dtype fp8 makes its own. A cache of fewer bits cannot be had."""
    kv = config.section("kv_cache_scheme")
    if kv is not None and (kv.whole("num_bits", 8), kv.text("type", "float")) != (8, "float"):
        raise UnsupportedModel(
            f"{kv.name}: a KV cache of {kv.whole('num_bits', 8)}-bit {kv.text('type', 'float')} is not supported; "
            "keys and values are kept in the model's type or in fp8 (--kv-cache-dtype)."
        )


def _read_group(group: ConfigFile) -> Group:
    weights = group.section("weights")
    if weights is None:
        raise UnsupportedModel(f"{group.name}: groups that quantise no weights are not supported.")
    bits, kind = weights.whole("num_bits", 8), weights.text("type", "int")
    size = int(weights.number("group_size", 0))
    strategy = weights.text("strategy", "channel" if size == -1 else "group" if size else "tensor")
    if (bits, kind) not in ((4, "int"), (8, "int"), (8, "float")) or strategy not in _STRATEGIES:
        raise UnsupportedModel(
            f"{weights.name}: weights of {bits}-bit {kind} with a scale per {strategy} are not supported. Supported: "
            f"int of 4 or 8 bits and float of 8, with a scale per {', '.join(_STRATEGIES)}."
        )
    block = tuple(weights.numbers("block_structure")) if strategy == "block" else None
    if block not in (None, (128, 128)) or (strategy == "group" and kind == "float"):
        raise UnsupportedModel(f"{weights.name}: fp8 has a scale per row, matrix or block of 128x128 here, no others.")
    return Group(
        targets=tuple(group.texts("targets")),
        bits=bits,
        is_float=kind == "float",
        group_size=weights.whole("group_size") if strategy == "group" else 0,
        block=block,
        is_symmetric=weights.flag("symmetric", True),
        inputs=_read_inputs(group.section("input_activations"), kind),
    )


def _read_inputs(inputs: ConfigFile | None, kind: str) -> Inputs:
    if inputs is None or inputs.whole("num_bits", 8) != 8 or inputs.text("type", "int") != kind:
        return Inputs.PLAIN
    if not inputs.flag("symmetric", True):
        return Inputs.PLAIN
    if inputs.flag("dynamic", False):
        return Inputs.PER_TOKEN
    return Inputs.FIXED if inputs.text("strategy", "tensor") == "tensor" else Inputs.PLAIN


def _unpacked(store: Store, module: str, columns: int, group: Group) -> CodedMatrix:
    """pack-quantized: codes along the inputs, the lowest bits first, and zero points along the outputs."""
    words = shaped(store, f"{module}.weight_packed", torch.int32, (-1, -(-columns * group.bits // 32)))
    rows, size = words.shape[0], group.group_size or columns
    groups = -(-columns // size)
    scale = shaped(store, f"{module}.weight_scale", None, (rows, groups), *_one_for_all(groups)).reshape(-1, groups)
    zero = None
    if not group.is_symmetric:
        packed = shaped(store, f"{module}.weight_zero_point", torch.int32, (-(-rows * group.bits // 32), groups))
        zero = codes_of(packed.T, group.bits)[:, :rows]
    codes, order = codes_of(words, group.bits)[:, :columns], None
    name = f"{module}.weight_g_idx"
    if store.has(name):
        order = group_order(shaped(store, name, None, (columns,)), size, name)
    return grouped(
        codes if order is None else codes[:, order], group.bits, scale.expand(rows, groups).T, size, zero, order
    )


def _grouped(store: Store, module: str, values: Tensor, group: Group) -> CodedMatrix:
    """int8 with a zero point, or with several scales to a row."""
    rows, columns = values.shape
    size = group.group_size or columns
    groups = -(-columns // size)
    scale = shaped(store, f"{module}.weight_scale", None, (rows, groups), *_one_for_all(groups)).reshape(-1, groups)
    zero = None
    if not group.is_symmetric:
        name = f"{module}.weight_zero_point"
        signed = shaped(store, name, torch.int8, (rows, groups), *_one_for_all(groups)).reshape(-1, groups)
        zero = _unsigned(signed.expand(rows, groups).T)
    return grouped(_unsigned(values), 8, scale.expand(rows, groups).T, size, zero)


def _scaled(store: Store, module: str, values: Tensor, group: Group) -> ScaledMatrix:
    fixed = None
    if group.inputs is Inputs.FIXED:
        fixed = shaped(store, f"{module}.input_scale", None, (), (1,), (1, 1)).to(torch.float32).reshape(())
    matrix = scaled(store, values, f"{module}.weight_scale", group.block, input_scale=fixed)
    return replace(matrix, quantises_inputs=group.inputs is not Inputs.PLAIN)


def _unsigned(values: Tensor) -> Tensor:
    """int8 as codes around 128."""
    return values.contiguous().view(torch.uint8) ^ 128


def _one_for_all(groups: int) -> tuple[tuple[int, ...], ...]:
    return ((), (1,), (1, 1)) if groups == 1 else ()


def _names(target: str, module: str) -> bool:
    return target == module


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _means_all(target: str, module: str) -> bool:
    return target in ("Linear", "LinearBase")
