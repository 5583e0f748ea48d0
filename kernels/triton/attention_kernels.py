"""Attention over paged keys and values, as Triton programs.

One program takes one KV head and a tile of rows: ``BLOCK_Q`` consecutive tokens of a sequence times the ``GROUP`` query
heads that share the KV head. It walks the keys in tiles that begin at multiples of ``BLOCK_N``, whatever tokens it has,
with the running softmax of Milakov and Gimelshein (arXiv 1805.02867) in powers of two; a tile that a row cannot see
changes none of its bits. With ``IS_SPLIT`` the keys are shared out to several programs, as in flash-decoding, and
``merge`` adds what they found.

Knows pointers and strides. What is chosen (tiles, splits) is ``kernels.triton.attention``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
FP8_LIFT: tl.constexpr = tl.constexpr(256.0)
"""Weights times scales of fp8 values are rounded to float16: lifted so far, small scales keep their precision, and
those of all float16 values stay in range."""


@triton.jit
def _find_row(query_starts, first_row, first_token, num_rows, tile, BLOCK_Q: tl.constexpr):
    """The row whose tiles hold number ``tile``: those of row r begin at (its first token) // BLOCK_Q + r."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        start = tl.load(query_starts + first_row + middle) - first_token
        if start // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _widen(pairs, IS_INTERPRETED: tl.constexpr):
    """fp8 numbers, two in each 16 bits, as float16: the lower ones and the upper ones.

    Matrix units take float16 in pairs along the keys. Taken apart like this, two pairs cost two permutations and two
    conversions; one by one, bytes would cost more than the memory takes to deliver them.
    """
    if IS_INTERPRETED:  # the exponent's bits are moved, and its bias of 7 is taken for 15
        lower = ((pairs << 8) & -0x8000) | ((pairs << 7) & 0x3F80)
        upper = (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
        return lower.to(tl.float16, bitcast=True) * 256.0, upper.to(tl.float16, bitcast=True) * 256.0
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 even, odd;
        .reg .b16 first, second, unused;
        prmt.b32 even, $2, 0, 0x0020;
        prmt.b32 odd, $2, 0, 0x0031;
        mov.b32 {first, unused}, even;
        mov.b32 {second, unused}, odd;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _scan(
    state_out,
    state_upper,
    state_sum,
    state_max,
    query,
    query_upper,
    keys_at,
    values_at,
    key_scales,
    value_scales,
    table,
    position,
    begin,
    end,
    limit,
    scale,
    block_stride,
    slot_stride,
    scale_block_stride,
    scale_slot_stride,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Folds the keys ``begin`` to ``end - 1`` into the state. Without ``IS_MASKED`` every row sees all of them."""
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, query.shape[1])
    is_dim = (dims < WIDTH)[None, :]
    # A tile's blocks are looked up one tile ahead: then its keys and values wait for nothing and can be copied early.
    blocks = tl.load(table + (begin + lanes) // BLOCK_SIZE, mask=begin + lanes < limit, other=0)
    for start in range(begin, end, BLOCK_N):
        keys = start + lanes
        exists = keys < limit
        # Tiles begin at multiples of their size.
        slots = lanes % BLOCK_SIZE if BLOCK_N % BLOCK_SIZE == 0 else keys % BLOCK_SIZE
        places = (blocks * block_stride + slots * slot_stride)[:, None] + dims[None, :]
        scale_places = blocks * scale_block_stride + slots * scale_slot_stride
        if IS_MASKED:
            key = tl.load(keys_at + places, mask=exists[:, None] & is_dim, other=0)
            value = tl.load(values_at + places, mask=exists[:, None] & is_dim, other=0)
        elif query.shape[1] == WIDTH:
            key = tl.load(keys_at + places)
            value = tl.load(values_at + places)
        else:
            key = tl.load(keys_at + places, mask=is_dim, other=0)
            value = tl.load(values_at + places, mask=is_dim, other=0)
        factor = scale
        if HAS_SCALES:
            if IS_MASKED:
                factor = scale * tl.load(key_scales + scale_places, mask=exists, other=0.0)[None, :]
                value_scale = tl.load(value_scales + scale_places, mask=exists, other=0.0)
            else:
                factor = scale * tl.load(key_scales + scale_places)[None, :]
                value_scale = tl.load(value_scales + scale_places)
        if BLOCK_N % BLOCK_SIZE == 0:
            ahead = (start + BLOCK_N) // BLOCK_SIZE + lanes // BLOCK_SIZE
        else:
            ahead = (keys + BLOCK_N) // BLOCK_SIZE
        blocks = tl.load(table + ahead, mask=keys + BLOCK_N < limit, other=0)

        if HAS_SCALES:
            key_lower, key_upper = _widen(key, IS_INTERPRETED)
            scores = tl.dot(query, tl.trans(key_lower.to(query.dtype)), input_precision="ieee")
            scores = tl.dot(query_upper, tl.trans(key_upper.to(query.dtype)), scores, input_precision="ieee")
        else:
            scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        multiplier = factor * LOG2_E
        if SOFT_CAP > 0:
            # cap * tanh(score / cap), by tanh(x) = 1 - 2 / (e^2x + 1), which is right at both ends.
            grown = tl.exp2(scores * (multiplier * (2.0 / SOFT_CAP)))
            scores = (SOFT_CAP * LOG2_E) * (1.0 - 2.0 / (grown + 1.0))
            multiplier = 1.0
        elif HAS_SCALES:
            scores = scores * multiplier
            multiplier = 1.0
        if IS_MASKED:
            visible = keys[None, :] <= position[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))

        largest = tl.maximum(state_max, tl.max(scores, 1) * multiplier)
        # A row that has seen no key yet: any number will do but infinity.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        decay = tl.exp2(state_max - shift)
        weights = tl.exp2(scores * multiplier - shift[:, None])
        state_sum = state_sum * decay + tl.sum(weights, 1)
        state_max = largest
        state_out = state_out * decay[:, None]
        if HAS_SCALES:
            weights = (weights * (value_scale * FP8_LIFT)[None, :]).to(query.dtype)
            value_lower, value_upper = _widen(value, IS_INTERPRETED)
            state_out = tl.dot(weights, value_lower.to(query.dtype), state_out, input_precision="ieee")
            state_upper = state_upper * decay[:, None]
            state_upper = tl.dot(weights, value_upper.to(query.dtype), state_upper, input_precision="ieee")
        else:
            state_out = tl.dot(weights.to(query.dtype), value.to(query.dtype), state_out, input_precision="ieee")
    return state_out, state_upper, state_sum, state_max


@triton.jit(
    do_not_specialize=["first_row", "first_token", "num_rows", "num_splits", "table_stride"],
)
def attend(
    query,
    data,
    scales,
    block_table,
    query_starts,
    positions,
    out,
    partial_out,
    partial_max,
    partial_sum,
    first_row,
    first_token,
    num_rows,
    num_splits,
    table_stride,
    scale,
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    block_stride,
    part_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_part_stride,
    scale_head_stride,
    scale_slot_stride,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
):
    """Rows ``first_row`` to ``first_row + num_rows - 1`` of a ragged batch, whose tokens begin at ``first_token``.

    Grid: (KV heads, tiles, splits); without ``IS_DECODE`` (a token per row, so a row is a tile) there may be a few
    more tiles than needed. ``query``, ``out`` [tokens, heads, HEAD_DIM]. ``data`` and ``scales`` begin at the layer's
    keys; with ``HAS_SCALES`` ``data`` is of pairs of fp8 numbers (int16), and its strides count pairs. With
    ``IS_SPLIT``, ``partial_out`` [tokens, heads, splits, HEAD_DIM], ``partial_max`` and ``partial_sum``
    [tokens, heads, splits], all float32, are written in place of ``out``. ``HAS_SHORTCUT``: keys that no row's mask
    hides go through a loop without masks.
    """
    # fp8 is widened to float16, which one instruction does, and exactly. The interpreter cannot multiply bfloat16.
    compute = query.dtype.element_ty
    if IS_INTERPRETED:
        compute = tl.float32
    elif HAS_SCALES and compute != tl.float32:
        compute = tl.float16
    head = tl.program_id(0)
    split = tl.program_id(2)
    if IS_DECODE:
        row = tl.program_id(1)
        query_start = (first_token + row).to(tl.int64)
        query_len = 1
        first = 0
    else:
        # Later tokens see more keys. Programs begin in this order: the longest ones first.
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        row = _find_row(query_starts, first_row, first_token, num_rows, tile, BLOCK_Q)
        query_start = tl.load(query_starts + first_row + row)
        query_len = (tl.load(query_starts + first_row + row + 1) - query_start).to(tl.int32)
        first = (tile - (query_start - first_token) // BLOCK_Q - row).to(tl.int32) * BLOCK_Q
        if first >= query_len:
            return

    lanes = tl.arange(0, BLOCK_M)
    token = first + lanes // GROUP
    query_head = head * GROUP + lanes % GROUP
    is_row = (lanes < BLOCK_Q * GROUP) & (token < query_len)
    past = tl.load(positions + first_row + row).to(tl.int32)
    position = past + token
    query_at = (query + (query_start + token) * query_token_stride + query_head * query_head_stride)[:, None]
    if HAS_SCALES:
        WIDTH: tl.constexpr = HEAD_DIM // 2
        pairs = tl.arange(0, BLOCK_D // 2)[None, :]
        is_pair = is_row[:, None] & (pairs < WIDTH)
        chosen = tl.load(query_at + pairs * 2, mask=is_pair, other=0.0).to(compute)
        chosen_upper = tl.load(query_at + pairs * 2 + 1, mask=is_pair, other=0.0).to(compute)
        state_out = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
        state_upper = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    else:
        WIDTH: tl.constexpr = HEAD_DIM
        numbers = tl.arange(0, BLOCK_D)[None, :]
        chosen = tl.load(query_at + numbers, mask=is_row[:, None] & (numbers < HEAD_DIM), other=0.0).to(compute)
        chosen_upper = chosen
        state_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        state_upper = state_out

    limit = past + tl.minimum(first + BLOCK_Q, query_len)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(past + first + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    end = limit
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(limit - begin, BLOCK_N), num_splits) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(begin + share, limit)
    # Keys up to the tile's first token are seen by all of its rows, unless a window hides them from the later ones.
    middle = begin
    if HAS_SHORTCUT:
        middle = tl.maximum(tl.minimum((past + first + 1) // BLOCK_N * BLOCK_N, end), begin)

    keys_at = data + head * head_stride
    key_scales = scales + head * scale_head_stride
    state_sum = tl.zeros([BLOCK_M], tl.float32)
    state_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_table + (first_row + row).to(tl.int64) * table_stride
    if HAS_SHORTCUT:
        state_out, state_upper, state_sum, state_max = _scan(
            state_out,
            state_upper,
            state_sum,
            state_max,
            chosen,
            chosen_upper,
            keys_at,
            keys_at + part_stride,
            key_scales,
            key_scales + scale_part_stride,
            table,
            position,
            begin,
            middle,
            limit,
            scale,
            block_stride,
            slot_stride,
            scale_block_stride,
            scale_slot_stride,
            WINDOW,
            SOFT_CAP,
            BLOCK_SIZE,
            WIDTH,
            BLOCK_N,
            HAS_SCALES,
            IS_INTERPRETED,
            False,
        )
    state_out, state_upper, state_sum, state_max = _scan(
        state_out,
        state_upper,
        state_sum,
        state_max,
        chosen,
        chosen_upper,
        keys_at,
        keys_at + part_stride,
        key_scales,
        key_scales + scale_part_stride,
        table,
        position,
        middle,
        end,
        limit,
        scale,
        block_stride,
        slot_stride,
        scale_block_stride,
        scale_slot_stride,
        WINDOW,
        SOFT_CAP,
        BLOCK_SIZE,
        WIDTH,
        BLOCK_N,
        HAS_SCALES,
        IS_INTERPRETED,
        True,
    )
    if HAS_SCALES:
        state_out = tl.interleave(state_out, state_upper) * (1.0 / FP8_LIFT)
    dims = tl.arange(0, BLOCK_D)
    is_number = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    if IS_SPLIT:
        num_heads = tl.num_programs(0) * GROUP
        part = ((query_start + token) * num_heads + query_head) * num_splits + split
        tl.store(partial_out + part[:, None] * HEAD_DIM + dims[None, :], state_out, mask=is_number)
        tl.store(partial_max + part, state_max, mask=is_row)
        tl.store(partial_sum + part, state_sum, mask=is_row)
    else:
        result = state_out / tl.where(is_row, state_sum, 1.0)[:, None]
        out_places = (query_start + token) * out_token_stride + query_head * out_head_stride
        tl.store(out + out_places[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=is_number)


@triton.jit(do_not_specialize=["first_token", "num_splits"])
def merge(
    partial_out,
    partial_max,
    partial_sum,
    out,
    first_token,
    num_splits,
    out_token_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The splits' findings of one token and head, weighed and added in the order of the keys. Grid: (tokens, heads)."""
    token = (first_token + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    splits = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    exists = splits < num_splits
    part = (token * tl.num_programs(1) + head) * num_splits + splits
    largest = tl.load(partial_max + part, mask=exists, other=float("-inf"))
    weights = tl.exp2(largest - tl.max(largest, 0))
    total = tl.sum(tl.load(partial_sum + part, mask=exists, other=0.0) * weights, 0)
    is_number = exists[:, None] & (dims < HEAD_DIM)[None, :]
    found = tl.load(partial_out + part[:, None] * HEAD_DIM + dims[None, :], mask=is_number, other=0.0)
    result = tl.sum(found * weights[:, None], 0) / total
    place = token * out_token_stride + head * out_head_stride + dims
    tl.store(out + place, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
