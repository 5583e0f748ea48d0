"""The checksum against a version of it in plain Python, which is the definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.integrity import BlockChecksum, finalise, key_words
from proto.ids import BlockHash
from tests.support.handoff import block_hash

M64 = (1 << 64) - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def oracle(data: bytes, name: bytes) -> int:
    """One pair of words after the other, with integers that do not overflow."""
    padded = data + bytes(-len(data) % 8)
    total = 0
    for j in range(len(padded) // 8):
        key = mix((0x74616E64656D6B76 + (j + 1) * 0x9E3779B97F4A7C15) & M64)
        low = int.from_bytes(padded[8 * j : 8 * j + 4], "little")
        high = int.from_bytes(padded[8 * j + 4 : 8 * j + 8], "little")
        total += ((low + key) % (1 << 32)) * ((high + (key >> 32)) % (1 << 32))
    a, b = int.from_bytes(name[:8], "little"), int.from_bytes(name[8:], "little")
    return mix(mix((mix((total ^ a) & M64) + b) & M64) ^ len(data))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=600), name=st.binary(min_size=16, max_size=16))
def test_it_is_what_it_says(data: bytes, name: bytes) -> None:
    assert BlockChecksum(len(data)).of(data, BlockHash(name)) == oracle(data, name)


@pytest.mark.parametrize("num_bytes", [4 << 16, (4 << 16) + 8, (8 << 16) - 3])
def test_rows_make_no_difference(num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    assert BlockChecksum(num_bytes).of(data, block_hash(0)) == oracle(data, block_hash(0))


def test_every_bit_counts() -> None:
    data, name = bytearray(random.Random(0).randbytes(64)), block_hash(0)
    checksum = BlockChecksum(64)
    right = checksum.of(bytes(data), name)
    for bit in range(64 * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum.of(bytes(data), name) != right
        data[bit // 8] ^= 1 << bit % 8


def test_the_right_bytes_of_another_block_are_wrong() -> None:
    checksum, data = BlockChecksum(64), bytes(64)
    assert len({checksum.of(data, block_hash(index)) for index in range(100)}) == 100


def test_order_matters() -> None:
    first, second = bytes(8), b"\x01" * 8
    checksum = BlockChecksum(16)
    assert checksum.of(first + second, block_hash(0)) != checksum.of(second + first, block_hash(0))


def test_length_matters() -> None:
    assert BlockChecksum(7).of(bytes(7), block_hash(0)) != BlockChecksum(8).of(bytes(8), block_hash(0))


def test_any_buffer_will_do() -> None:
    data = random.Random(1).randbytes(64)
    words = np.frombuffer(data, dtype=np.float16).reshape(4, 8)
    checksum = BlockChecksum(64)
    assert (
        checksum.of(data, block_hash(0))
        == checksum.of(memoryview(bytearray(data)), block_hash(0))
        == checksum.of(memoryview(words), block_hash(0))
    )


def test_what_is_no_block_is_refused() -> None:
    checksum = BlockChecksum(64)
    with pytest.raises(ValueError, match="64 bytes"):
        checksum.of(bytes(63), block_hash(0))
    with pytest.raises(ValueError, match="16 bytes"):
        checksum.of(bytes(64), BlockHash(b"short"))
    with pytest.raises(ValueError, match="1 byte"):
        BlockChecksum(0)


def test_the_key_is_a_prefix_of_any_longer_one_and_cannot_be_changed() -> None:
    assert np.array_equal(key_words(16), key_words(64)[:16])
    with pytest.raises(ValueError, match="read-only"):
        key_words(16)[0] = 1


def test_a_known_value() -> None:
    """So that a change of the definition, which peers of another version would notice, is noticed here first."""
    assert finalise(0, BlockHash(bytes(16)), 0) == 0
    assert BlockChecksum(16).of(bytes(range(16)), BlockHash(bytes(range(16)))) == oracle(
        bytes(range(16)), bytes(range(16))
    )
    assert BlockChecksum(16).of(bytes(range(16)), BlockHash(bytes(range(16)))) == 0x54AF4B18E17B58F0
