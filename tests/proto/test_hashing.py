"""Block hashes: equal for equal content and history, different for anything else, the same in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.hashing import HASH_BYTES, BlockHasher

TOKENS = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=40)


@given(TOKENS, TOKENS)
def test_prefixes_share_hashes_and_nothing_after_the_first_difference(one: list[int], other: list[int]) -> None:
    hasher = BlockHasher("model", 4)
    for mine, theirs, start in zip(hasher.full_blocks(one), hasher.full_blocks(other), range(0, 80, 4), strict=False):
        assert (mine == theirs) == (one[: start + 4] == other[: start + 4])


@given(TOKENS)
def test_all_blocks_are_the_full_ones_and_a_partial_last(tokens: list[int]) -> None:
    hasher = BlockHasher("model", 4)
    full, every = hasher.full_blocks(tokens), hasher.all_blocks(tokens)
    assert every[: len(full)] == full
    assert len(every) == -(-len(tokens) // 4)
    assert all(len(each) == HASH_BYTES for each in every)


def test_a_partial_block_never_equals_a_full_one() -> None:
    short, long = BlockHasher("model", 2), BlockHasher("model", 4)
    assert short.child(short.root(), [1, 2]) != long.child(long.root(), [1, 2])


@pytest.mark.parametrize(
    ("namespace", "key", "salt"), [("other", b"", ""), ("model", b"key", ""), ("model", b"", "tenant")]
)
def test_models_deployments_and_tenants_are_apart(namespace: str, key: bytes, salt: str) -> None:
    plain = BlockHasher("model", 4).full_blocks([1, 2, 3, 4])
    assert BlockHasher(namespace, 4, key).full_blocks([1, 2, 3, 4], salt) != plain


def test_every_process_agrees() -> None:
    program = (
        "from proto.hashing import BlockHasher; print(BlockHasher('m', 2, b'k').full_blocks([1, 2, 3, 4])[1].hex())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == BlockHasher("m", 2, b"k").full_blocks([1, 2, 3, 4])[1].hex()


@pytest.mark.parametrize("tokens", [[], [1, 2, 3, 4, 5]])
def test_a_block_holds_what_a_block_holds(tokens: list[int]) -> None:
    hasher = BlockHasher("model", 4)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        hasher.child(hasher.root(), tokens)
    with pytest.raises(ValueError, match="block_size"):
        BlockHasher("model", 0)
