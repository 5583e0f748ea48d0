"""What a block of KV memory looks like, and when two workers' blocks are the same thing.

Block-major: all layers of one block are one contiguous region, so a hand-off moves one region per block. ``spans``
lists what lies where inside it, so that uneven layers, scales and latent attention fit without another format.
Knows sizes and names; holds no memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

WIRE_VERSION = 1
"""Version of the messages between processes. Workers speak to peers of this version and of the two beside it."""

BLOCK_FORMAT = 1
"""Version of what the bytes of a block mean. Peers of different formats cannot use each other's blocks; it has its own
number, so that a rolling update to a newer wire version goes on handing blocks over."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
FP8 = "float8_e4m3fn"
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Span:
    """``num_bytes`` at ``offset`` of a block: one layer's keys or values, ``[block_size, kv_heads, head_dim]``, or
    their scales, ``[kv_heads, block_size]``."""

    layer: int
    part: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of every block of one worker: ``[num_layers, 2, block_size, kv_heads, head_dim]`` of ``dtype``.

    fp8 has scales behind it, float32 ``[num_layers, 2, kv_heads, block_size]``: one for each token and head, so that a
    token's bytes are the same whatever block-mates it gets.
    """

    num_layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    model_digest: str

    def __post_init__(self) -> None:
        if self.has_scales and self.head_dim % 2:
            raise ValueError(f"scales are aligned behind heads of an even size, not of {self.head_dim}")

    @property
    def has_scales(self) -> bool:
        return self.dtype == FP8

    @property
    def bytes_per_token(self) -> int:
        scale = SCALE_BYTES if self.has_scales else 0
        return self.num_layers * 2 * self.kv_heads * (self.head_dim * DTYPE_BYTES[self.dtype] + scale)

    @property
    def data_bytes(self) -> int:
        """What keys and values take of a block; scales, if any, begin there."""
        return self.num_layers * 2 * self.block_size * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def spans(self) -> list[Span]:
        """The parts of a block in address order; they tile it without gaps."""
        parts = [(layer, part) for layer in range(self.num_layers) for part in ("key", "value")]
        size = self.data_bytes // len(parts)
        spans = [Span(layer, part, index * size, size) for index, (layer, part) in enumerate(parts)]
        if self.has_scales:
            size = self.block_size * self.kv_heads * SCALE_BYTES
            spans += [
                Span(layer, f"{part} scale", self.data_bytes + index * size, size)
                for index, (layer, part) in enumerate(parts)
            ]
        return spans

    def fingerprint(self) -> str:
        """Equal fingerprints mean that a block of one worker can be used by the other as it is."""
        fields = (
            BLOCK_FORMAT,
            self.num_layers,
            self.block_size,
            self.kv_heads,
            self.head_dim,
            self.dtype,
            self.model_digest,
        )
        return hashlib.blake2b(repr(fields).encode(), digest_size=12).hexdigest()

    def describe(self) -> str:
        """One line for logs and for a mismatch's error."""
        return (
            f"model {self.model_digest}, {self.num_layers} layers, {self.kv_heads} KV heads of {self.head_dim}, "
            f"{self.dtype}, blocks of {self.block_size} tokens ({self.block_bytes:,} bytes)"
        )


@dataclass(frozen=True, slots=True)
class MemoryExport:
    """Where another process of this host can map a worker's KV memory: ``/proc/<pid>/fd/<fd>``, read-only.

    Block ``b`` lies at ``b * block_bytes``. ``nonce`` (16 bytes) is written at ``nonce_offset``, after the last block:
    a reader that finds it there reads the memory it means, and not that of another process or container.
    """

    pid: int
    fd: int
    num_bytes: int
    nonce_offset: int
    nonce: bytes
