"""The checksum of a block: one pass of multiply-and-add that any number of threads can share.

    x        the block as little-endian 32-bit words, padded with zeros to an even number
    k        words of the key: 64-bit word j is splitmix64's output j, low half first
    total    sum over j of ((x[2j] + k[2j]) mod 2^32) * ((x[2j+1] + k[2j+1]) mod 2^32), mod 2^64
    checksum mix(mix(mix(total ^ a) + b) ^ length)    a, b: the halves of the block's hash; mix: splitmix64's finaliser

The sum is NH of UMAC (RFC 4418): terms are independent and addition commutes, so a kernel may add them in any order,
and two different blocks collide with probability 2^-32. The hash goes through two rounds of ``mix``, a bijection, so
the right bytes of the wrong block fail too (but for one in 2^64).

It finds damage and mistakes. It is no signature: the key is public.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from proto.hashing import HASH_BYTES
from proto.ids import BlockHash

_GOLDEN = 0x9E3779B97F4A7C15
_KEY_SEED = 0x7461_6E64_656D_6B76
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_ROW_WORDS = 1 << 16
"""Words per row: 256 KiB, so that a row and its products stay in a core's cache."""
_LOW = np.uint64(0xFFFF_FFFF)
_SHIFT = np.uint64(32)


class BlockChecksum:
    """Checksums blocks of ``num_bytes`` bytes. Immutable, so threads may share one; numpy lets other threads run."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < 1:
            raise ValueError(f"a block has 1 byte or more, got {num_bytes}")
        self._num_bytes = num_bytes
        self._key = key_words(-(-num_bytes // 8) * 2)

    def of(self, data: bytes | memoryview, block_hash: BlockHash) -> int:
        """64 bits. Raises ValueError where ``data`` is not a block, or ``block_hash`` no hash."""
        view = memoryview(data).cast("B")
        if len(view) != self._num_bytes:
            raise ValueError(f"expected a block of {self._num_bytes} bytes, got {len(view)}")
        if len(view) % 8:
            view = memoryview(bytes(view) + bytes(-len(view) % 8))
        words = np.frombuffer(view, dtype="<u4")
        total = 0
        for start in range(0, len(words), _ROW_WORDS):
            row = words[start : start + _ROW_WORDS] + self._key[start : start + _ROW_WORDS]
            pairs = row.view(np.uint64)
            total += int(((pairs & _LOW) * (pairs >> _SHIFT)).sum(dtype=np.uint64))
        return finalise(total, block_hash, self._num_bytes)


@functools.lru_cache(maxsize=8)
def key_words(num_words: int) -> npt.NDArray[np.uint32]:
    """The first ``num_words`` (an even number) words of the key, read-only. As large as a block, so made once."""
    index = np.arange(1, num_words // 2 + 1, dtype=np.uint64)
    state = index * np.uint64(_GOLDEN) + np.uint64(_KEY_SEED)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = (state ^ (state >> np.uint64(31))).astype("<u8").view("<u4")
    words.setflags(write=False)
    return words


def finalise(total: int, block_hash: BlockHash, num_bytes: int) -> int:
    """Seeds a block's ``total`` (any integer; taken mod 2^64) with its hash and length."""
    if len(block_hash) != HASH_BYTES:
        raise ValueError(f"a block hash has {HASH_BYTES} bytes, got {len(block_hash)}")
    first = int.from_bytes(block_hash[:8], "little")
    second = int.from_bytes(block_hash[8:], "little")
    mixed = _mix((total & _MASK) ^ first)
    mixed = _mix((mixed + second) & _MASK)
    return _mix(mixed ^ num_bytes)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
