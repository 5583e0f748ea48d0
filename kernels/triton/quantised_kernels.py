"""Products with matrices in fewer bits, as Triton programs.

Each program makes a tile of the result: ``BLOCK_N`` rows of the matrix times ``BLOCK_M`` tokens. The matrix is the left
factor of a tile's product, so that its numbers go from memory through registers, where they are widened, straight into
the multiplication. With several splits the columns are shared out to as many programs, and ``merge`` adds what they
found in order. Sums are float32 (of int8 inputs: int32, which is exact).

What changes from step to step is not specialised: a program is compiled once for each shape of tiles.
Knows pointers and strides. What is chosen (tiles, splits) is ``kernels.triton.quantised``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_LARGEST: tl.constexpr = tl.constexpr(448.0)
INT8_LARGEST: tl.constexpr = tl.constexpr(127.0)
HALF: tl.constexpr = tl.constexpr(32)
"""As ``kernels.quantised.pack``: byte j of a chunk has numbers j and j + HALF of its 64."""
GROUP_TILES: tl.constexpr = tl.constexpr(8)
"""Tiles of rows that are taken together through all tokens, so that both factors come from the cache."""


@triton.jit
def _round_to_fp8(number):
    """The nearest number of float8_e4m3fn, as float32, ties to even. Devices round so, the interpreter does not."""
    bits = number.to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits behind the first one
    small = (number + 24576.0) - 24576.0  # steps of 2**-9, which float32 has from 2**14 to 2**15
    rounded = tl.where(tl.abs(number) < 0.015625, small, kept.to(tl.float32, bitcast=True))
    inside = tl.minimum(tl.maximum(rounded, -FP8_LARGEST), FP8_LARGEST)
    return tl.where(number == number, inside, number)


@triton.jit
def quantise_inputs(
    x,
    fixed_scale,
    out,
    scales,
    columns,
    per_scale,
    x_stride,
    out_stride,
    scales_stride,
    IS_INT: tl.constexpr,
    HAS_FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``per_scale`` columns of one token. What is not finite makes the scale infinite, and so the result not finite."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * per_scale
    end = tl.minimum(begin + per_scale, columns)
    if HAS_FIXED:
        scale = tl.load(fixed_scale)
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            number = tl.load(x + token * x_stride + at, mask=at < end, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.where(number == number, tl.abs(number), float("inf")))
        top = tl.max(largest, 0)
        scale = tl.div_rn(tl.where(top == 0, 1.0, top), INT8_LARGEST if IS_INT else FP8_LARGEST)
    unsound = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        number = tl.load(x + token * x_stride + at, mask=at < end, other=0.0).to(tl.float32)
        unsound = tl.where(tl.abs(number) < float("inf"), unsound, 1.0)
        number = tl.div_rn(number, scale + tl.zeros_like(number))
        if IS_INT:
            number = tl.minimum(tl.maximum(tl.floor(number + 0.5), -128.0), 127.0)
        else:
            number = _round_to_fp8(number)
        tl.store(out + token * out_stride + at, number.to(out.dtype.element_ty), mask=at < end)
    tl.store(scales + token * scales_stride + part, tl.where(tl.max(unsound, 0) > 0, float("inf"), scale))


@triton.jit
def _tile(num_row_tiles, num_token_tiles):
    """Which tile of rows, and which of tokens, this program makes."""
    program = tl.program_id(0)
    together = GROUP_TILES * num_token_tiles
    first = program // together * GROUP_TILES
    size = tl.minimum(num_row_tiles - first, GROUP_TILES)
    return first + program % together % size, program % together // size


@triton.jit
def _store(
    result,
    bias,
    out,
    row,
    token,
    rows,
    tokens,
    out_stride,
    split_stride,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``result [BLOCK_N, BLOCK_M]`` to ``out [tokens, rows]``; a split's part is stored as it is."""
    fits = (token < tokens)[:, None] & (row < rows)[None, :]
    number = tl.trans(result)
    if IS_SPLIT:
        out += tl.program_id(1).to(tl.int64) * split_stride
    elif HAS_BIAS:
        number += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    places = token.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(out + places, number.to(out.dtype.element_ty), mask=fits)


@triton.jit
def _from_bytes(stored, COMPUTE: tl.constexpr):
    """float8_e4m3fn from its bytes, less a factor of 256: its bits are those of a float16 of smaller exponent."""
    wide = stored.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(COMPUTE)


@triton.jit
def _from_codes(codes, zero, BITS: tl.constexpr, COMPUTE: tl.constexpr):
    """``codes - zero`` of unsigned codes, exactly: a code is put below the bits of a number that counts in ones, which
    is cheaper than a conversion. ``zero``: of type ``COMPUTE``."""
    if tl.float16 == COMPUTE:
        number = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return number - (zero + 1024.0).to(tl.float16)
    if tl.bfloat16 == COMPUTE and BITS == 4:
        number = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return number - (zero + 128.0).to(tl.bfloat16)
    number = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (number - (zero.to(tl.float32) + 8388608.0)).to(COMPUTE)


@triton.jit(do_not_specialize=["tokens", "tiles_per_split"])
def multiply_scaled(
    x,
    x_scales,
    values,
    scale,
    bias,
    out,
    tokens,
    rows,
    columns,
    tiles_per_split,
    x_stride,
    x_scales_stride,
    values_stride,
    scale_stride,
    out_stride,
    split_stride,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``ScaledMatrix`` times tokens. ``KIND``: "8-bit" where ``x`` is of the matrix's type with ``x_scales``; else the
    matrix is widened to ``COMPUTE``, "fp8" by an instruction, "bytes" of fp8 or "int8" by hand. With ``HAS_BLOCKS``
    each ``COLUMNS_PER_SCALE`` columns have a scale, of the tokens, too."""
    row_tile, token_tile = _tile(tl.cdiv(rows, BLOCK_N), tl.cdiv(tokens, BLOCK_M))
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = values + (row % rows).to(tl.int64)[:, None] * values_stride
    token_at = x + (token % tokens).to(tl.int64)[None, :] * x_stride
    scale_at = scale + (row % rows) // ROWS_PER_SCALE * scale_stride
    x_scale_at = x_scales + (token % tokens) * x_scales_stride
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if tl.int8 == COMPUTE and not HAS_BLOCKS else tl.float32)
    begin = tl.program_id(1) * tiles_per_split * BLOCK_K
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_K, columns), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        is_column = column < columns
        number = tl.load(row_at + column[None, :], mask=is_column[None, :], other=0.0)
        if KIND == "bytes":
            number = _from_bytes(number, COMPUTE)
        elif KIND == "int8":
            codes = number.to(tl.uint8, bitcast=True) ^ 0x80
            number = _from_codes(codes, tl.full((1, 1), 128.0, COMPUTE), 8, COMPUTE)
        else:
            number = number.to(COMPUTE)
        factor = tl.load(token_at + column[:, None], mask=is_column[:, None], other=0.0).to(COMPUTE)
        if HAS_BLOCKS:
            part = tl.dot(number, factor, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
            both = tl.load(scale_at + start // COLUMNS_PER_SCALE)[:, None]
            if KIND == "8-bit":
                both = both * tl.load(x_scale_at + start // COLUMNS_PER_SCALE)[None, :]
            total += part * both
        elif tl.int8 == COMPUTE:
            total = tl.dot(number, factor, total, out_dtype=tl.int32)
        else:
            total = tl.dot(number, factor, total, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
    result = total.to(tl.float32)
    if not HAS_BLOCKS:
        result *= tl.load(scale_at)[:, None]
        if KIND == "8-bit":
            result *= tl.load(x_scale_at)[None, :]
    if KIND == "bytes":
        result *= 256.0
    _store(result, bias, out, row, token, rows, tokens, out_stride, split_stride, IS_SPLIT, HAS_BIAS)


@triton.jit
def _group(
    scale,
    zero,
    table,
    codes,
    row,
    rows,
    group,
    stride,
    MIDDLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The numbers of a tile of codes that shares one ``group``, not scaled, and the rows' scales."""
    at = group * stride + row % rows
    factor = tl.load(scale + at).to(tl.float32)
    if HAS_TABLE:
        return tl.load(table + codes.to(tl.int32)).to(COMPUTE), factor
    if HAS_ZERO:
        middle = tl.load(zero + at).to(tl.float32).to(COMPUTE)[:, None]
    else:
        middle = tl.full((1, 1), MIDDLE, COMPUTE)
    return _from_codes(codes, middle, BITS, COMPUTE), factor


@triton.jit(do_not_specialize=["tokens", "tiles_per_split"])
def multiply_coded(
    x,
    codes,
    scale,
    zero,
    table,
    bias,
    out,
    tokens,
    rows,
    columns,
    num_bytes,
    tiles_per_split,
    group_size,
    x_stride,
    codes_stride,
    scale_stride,
    out_stride,
    split_stride,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """``CodedMatrix`` times tokens, ``BLOCK_B`` bytes of a row at once. Of 4-bit codes the lower halves of bytes are
    multiplied first, then the upper ones; each lot of a tile lies in one group, whose scale comes after the product."""
    row_tile, token_tile = _tile(tl.cdiv(rows, BLOCK_N), tl.cdiv(tokens, BLOCK_M))
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = codes + (row % rows).to(tl.int64)[:, None] * codes_stride
    token_at = x + (token % tokens).to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    factor = tl.zeros((BLOCK_N,), dtype=tl.float32)
    begin = tl.program_id(1) * tiles_per_split * BLOCK_B
    for start in range(begin, tl.minimum(begin + tiles_per_split * BLOCK_B, num_bytes), BLOCK_B):
        place = start + tl.arange(0, BLOCK_B)
        stored = tl.load(row_at + place[None, :], mask=(place < num_bytes)[None, :], other=0)
        if BITS == 8:
            group = start // group_size if HAS_GROUPS else 0
            number, factor = _group(
                scale, zero, table, stored, row, rows, group, scale_stride, MIDDLE, HAS_ZERO, HAS_TABLE, BITS, COMPUTE
            )
            inputs = tl.load(token_at + place[:, None], mask=(place < columns)[:, None], other=0.0).to(COMPUTE)
            part = tl.dot(number, inputs, input_precision="ieee")
            total += part * factor[:, None] if HAS_GROUPS else part
        else:
            for half in tl.static_range(2):
                column = place // HALF * (2 * HALF) + place % HALF + half * HALF
                group = (start * 2 + half * HALF) // group_size if HAS_GROUPS else 0
                nibble = stored >> 4 if half else stored & 15
                number, factor = _group(
                    scale,
                    zero,
                    table,
                    nibble,
                    row,
                    rows,
                    group,
                    scale_stride,
                    MIDDLE,
                    HAS_ZERO,
                    HAS_TABLE,
                    BITS,
                    COMPUTE,
                )
                inputs = tl.load(token_at + column[:, None], mask=(column < columns)[:, None], other=0.0).to(COMPUTE)
                part = tl.dot(number, inputs, input_precision="ieee")
                total += part * factor[:, None] if HAS_GROUPS else part
    if not HAS_GROUPS:
        total *= tl.load(scale + row % rows).to(tl.float32)[:, None]
    _store(total, bias, out, row, token, rows, tokens, out_stride, split_stride, IS_SPLIT, HAS_BIAS)


@triton.jit(do_not_specialize=["num_splits"])
def merge(parts, bias, out, rows, num_splits, split_stride, out_stride, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a token's splits, the first one first."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(num_splits):
        total += tl.load(parts + split * split_stride + token * rows + row, mask=row < rows, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=row < rows)
