"""The maths of one step in plain torch: the oracle for every compiled twin, and what runs where there is none."""

from kernels.reference.attention import attend, attend_chunk, attend_decode, quantise_kv, widen_kv, write_kv
from kernels.reference.elementwise import ACTIVATIONS, gate, rms_norm, rotate
from kernels.reference.fused import add_norm, rotate_and_write, rotate_and_write_by
from kernels.reference.linear import DenseLinear, linear
from kernels.reference.sampling import draw

__all__ = [
    "ACTIVATIONS",
    "DenseLinear",
    "add_norm",
    "attend",
    "attend_chunk",
    "attend_decode",
    "draw",
    "gate",
    "linear",
    "quantise_kv",
    "rms_norm",
    "rotate",
    "rotate_and_write",
    "rotate_and_write_by",
    "widen_kv",
    "write_kv",
]
