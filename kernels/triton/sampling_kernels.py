"""One token from each row of scores, as Triton programs: cut-offs by threshold, noise, and the largest.

Nothing is sorted. Tokens are cut off below a threshold, which is the smallest number v of the row such that the tokens
above v weigh less than a limit: count less than top_k, or hold less than top_p of the probability. ``_search`` finds it
among all float32 numbers, two bits of its order a pass, so ties stay together as they do in ``kernels.reference``.

Knows pointers and strides; which programs to start is ``kernels.triton.sampling``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2_HIGH: tl.constexpr = tl.constexpr(0.693145752)
LN_2_LOW: tl.constexpr = tl.constexpr(1.42860677e-6)
LARGEST_BELOW_ONE: tl.constexpr = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mix(h):
    """MurmurHash3's 32-bit finaliser."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _log(x):
    """Of normal numbers above 0, with a relative error below 2e-7; as ``kernels/cpu/noise.c``.

    The device's own logarithm is coarse near 1.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    is_large = mantissa > 1.41421356
    mantissa = tl.where(is_large, mantissa * 0.5, mantissa)
    exponent = tl.where(is_large, exponent + 1.0, exponent)
    # log m = 2 atanh s with s = (m - 1) / (m + 1), |s| < 0.172
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = ((2.0 / 9 * z + 2.0 / 7) * z + 2.0 / 5) * z + 2.0 / 3
    return exponent * LN_2_HIGH + (s * 2.0 + (s * z * series + exponent * LN_2_LOW))


@triton.jit
def _gumbel(tokens, low, high):
    """As ``kernels.noise.gumbel``: the same integers, and logarithms within float32's last bits."""
    bits = _mix(_mix(tokens.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
    # As signed numbers, whose negative half is the upper one: float32 keeps more of those near 0.
    uniform = (bits.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    uniform = tl.where(uniform < 0.0, uniform + 1.0, uniform)
    uniform = tl.minimum(uniform, LARGEST_BELOW_ONE)
    # -log1p(-u): the logarithm of the rounded 1 - u, and what the rounding lost
    rest = 1.0 - uniform
    lost = (1.0 - rest) - uniform
    return -_log(-(_log(rest) + lost / rest))


@triton.jit
def _in_order(x):
    """int32 in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _search(row, temperature, threshold, largest, limit, vocab_size, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest v such that the tokens above v, of those not below ``threshold``, weigh less than ``limit``.

    A token weighs 1, or with ``BY_MASS`` exp(x - largest). Two bits of v a pass: how many of three candidates fail.
    """
    found = tl.zeros([], tl.int64)  # v's place in the order, from 0
    step = tl.full([], 1 << 30, tl.int64)
    while step > 0:
        first = (found + step - 1 - 2147483648).to(tl.int32)
        second = (found + 2 * step - 1 - 2147483648).to(tl.int32)
        third = (found + 3 * step - 1 - 2147483648).to(tl.int32)
        above_first = tl.zeros([BLOCK], tl.float32)
        above_second = tl.zeros([BLOCK], tl.float32)
        above_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf"))
            x = tl.div_rn(x, temperature + tl.zeros_like(x))
            if BY_MASS:
                weight = tl.exp(x - largest)
            else:
                weight = tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where((tokens < vocab_size) & (x >= threshold), weight, 0.0)
            place = _in_order(x)
            above_first += tl.where(place > first, weight, 0.0)
            above_second += tl.where(place > second, weight, 0.0)
            above_third += tl.where(place > third, weight, 0.0)
        found += step * (
            (tl.sum(above_first, 0) >= limit).to(tl.int64)
            + (tl.sum(above_second, 0) >= limit).to(tl.int64)
            + (tl.sum(above_third, 0) >= limit).to(tl.int64)
        )
        step = step >> 2
    place = (found - 2147483648).to(tl.int32)
    return (place ^ ((place >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["vocab_size"])
def cut(scores, rows, temperatures, log_min_p, top_k, top_p, thresholds, stride, vocab_size, BLOCK: tl.constexpr):
    """Grid: (rows that cut anything off), which ``rows`` names. Their ``thresholds`` are of scores by temperature.

    ``log_min_p`` -inf, ``top_k`` 0 and ``top_p`` 1 (float32, each a list beside ``rows``) cut off nothing.
    """
    index = tl.program_id(0)
    number = tl.load(rows + index)
    row = scores + number * stride
    temperature = tl.load(temperatures + number)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf"))
        largest = tl.maximum(largest, tl.div_rn(x, temperature + tl.zeros_like(x)))
    most = tl.max(largest, 0)
    threshold = most + tl.load(log_min_p + index)
    count = tl.load(top_k + index)
    share = tl.load(top_p + index)
    if most > float("-inf"):
        if count > 0.0:
            found = _search(row, temperature, threshold, most, count, vocab_size, False, BLOCK)
            # Fewer tokens than top_k are left: v is below all numbers, and is no number itself.
            threshold = tl.where(found == found, tl.maximum(threshold, found), threshold)
        if share < 1.0:
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                x = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf"))
                x = tl.div_rn(x, temperature + tl.zeros_like(x))
                mass += tl.where(x >= threshold, tl.exp(x - most), 0.0)
            limit = share * tl.sum(mass, 0)
            threshold = tl.maximum(
                threshold, _search(row, temperature, threshold, most, limit, vocab_size, True, BLOCK)
            )
    tl.store(thresholds + number, threshold)


@triton.jit(do_not_specialize=["vocab_size"])
def pick(
    scores,
    temperatures,
    keys,
    thresholds,
    best,
    tokens_out,
    stride,
    vocab_size,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, spans of ``SPAN`` tokens). ``best`` [rows, spans] is a span's largest number, by temperature and
    with noise, and ``tokens_out`` (int64) its token, the first of equals. A temperature of 0: the scores themselves."""
    number = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SPAN
    row = scores + number * stride
    temperature = tl.load(temperatures + number)
    threshold = tl.load(thresholds + number)
    key = tl.load(keys + number)
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    chosen = first + lanes
    for start in range(first, tl.minimum(first + SPAN, vocab_size), BLOCK):
        tokens = start + lanes
        x = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf"))
        if temperature > 0.0:
            x = tl.div_rn(x, temperature + tl.zeros_like(x))
            x = tl.where(x < threshold, float("-inf"), x + _gumbel(tokens, low, high))
        is_larger = x > largest
        largest = tl.where(is_larger, x, largest)
        chosen = tl.where(is_larger, tokens, chosen)
    most = tl.max(largest, 0)
    token = tl.min(tl.where(largest == most, chosen, 2147483647), 0)
    place = number * tl.num_programs(1) + tl.program_id(1)
    tl.store(best + place, most)
    tl.store(tokens_out + place, token.to(tl.int64))
