"""Names for blocks of tokens, equal on every process that is given the same key.

A block's hash covers its own tokens and, through its parent, everything before it; the root covers the model and the
request's cache salt. So equal hashes mean equal KV content, and one tenant cannot probe another tenant's prefixes.
BLAKE2b, keyed, 16 bytes; never Python's ``hash()``, which is seeded per process.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from proto.ids import BlockHash

HASH_BYTES = 16
_FULL = b"\x01"
_PARTIAL = b"\x02"


def hash_key(secret: str) -> bytes:
    """The key of a deployment's BlockHasher, from its secret of any length; an empty secret means no key."""
    return hashlib.blake2b(secret.encode()).digest() if secret else b""


class BlockHasher:
    """Hashes token sequences block by block.

    ``namespace`` separates models (use the model digest), ``key`` separates deployments (secret, up to 64 bytes).
    """

    def __init__(self, namespace: str, block_size: int, key: bytes = b"") -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be 1 or more, got {block_size}")
        self.block_size = block_size
        self._key = key
        self._namespace = namespace.encode()

    def root(self, salt: str = "") -> BlockHash:
        """The parent of a sequence's first block."""
        digest = hashlib.blake2b(self._namespace, digest_size=HASH_BYTES, key=self._key)
        digest.update(b"\x00" + salt.encode())
        return BlockHash(digest.digest())

    def child(self, parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
        """The hash of the block holding ``tokens`` after ``parent``.

        A partial block (fewer tokens than ``block_size``) never equals a full one.
        """
        if not 0 < len(tokens) <= self.block_size:
            raise ValueError(f"a block holds 1 to {self.block_size} tokens, got {len(tokens)}")
        kind = _FULL if len(tokens) == self.block_size else _PARTIAL
        digest = hashlib.blake2b(parent, digest_size=HASH_BYTES, key=self._key)
        digest.update(kind + array("q", tokens).tobytes())
        return BlockHash(digest.digest())

    def full_blocks(self, tokens: Sequence[int], salt: str = "") -> list[BlockHash]:
        """Hashes of the full blocks of ``tokens``, in order."""
        return self.extend(self.root(salt), tokens[: len(tokens) - len(tokens) % self.block_size])

    def all_blocks(self, tokens: Sequence[int], salt: str = "") -> list[BlockHash]:
        """Hashes of every block of ``tokens``; the last one may be of a partial block."""
        return self.extend(self.root(salt), tokens)

    def extend(self, parent: BlockHash, tokens: Sequence[int]) -> list[BlockHash]:
        """Hashes of the blocks of ``tokens`` that come after ``parent``."""
        hashes: list[BlockHash] = []
        for start in range(0, len(tokens), self.block_size):
            parent = self.child(parent, tokens[start : start + self.block_size])
            hashes.append(parent)
        return hashes
