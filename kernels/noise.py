"""Random numbers as a pure function of (seed, position, token id): the same bits in any batch, on any worker.

    key   = splitmix64(splitmix64(seed) + position)          64 bits; k0, k1 = its low and high 32
    h     = mix(token * 0x9E3779B1 + k0);  h = mix(h ^ k1)   wrapping 32-bit arithmetic; mix: MurmurHash3's finaliser
    E     = -log1p(-(h + 0.5) / 2^32)                        one draw of the exponential distribution, float32
    noise = -log(E)                                          one draw of Gumbel's distribution

The integers are exact on every device, so a compiled twin that follows these lines draws the same numbers up to the
last bit of its logarithm. Small E decide who wins, and (h + 0.5) / 2^32 keeps full float32 precision there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.upload import upload

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B1
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def splitmix64(value: int) -> int:
    """One step of the splitmix64 generator: a bijection of 64-bit integers."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def draw_key(seed: int, position: int) -> int:
    """The 64-bit key of one draw. ``seed`` counts modulo 2^64; ``position`` is that of the generated token."""
    return splitmix64((splitmix64(seed & _MASK64) + position) & _MASK64)


def gumbel(keys: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise, float32 ``[len(keys), vocab_size]``; row i depends on ``keys[i]`` alone."""
    low = upload([[_signed(key)] for key in keys], torch.int32, device)
    high = upload([[_signed(key >> 32)] for key in keys], torch.int32, device)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_signed(_GOLDEN))
    bits = _mix(_mix(tokens + low).bitwise_xor_(high))
    uniform = bits.float().add_(0.5).mul_(2.0**-32)
    uniform = torch.where(uniform < 0, uniform + 1.0, uniform).clamp_(max=_LARGEST_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place on int32; shifts are made logical by masks."""
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def _signed(value: int) -> int:
    """The low 32 bits of ``value`` as a signed integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
