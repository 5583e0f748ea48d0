"""How a worker's prefix cache changes, as its engine says and as the ledger passes on."""

from __future__ import annotations

from dataclasses import dataclass

from proto.ids import BlockHash


@dataclass(frozen=True, slots=True)
class Stored:
    """These blocks can be matched from now on."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Evicted:
    """These blocks can no longer be matched."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing that was stored before can be matched."""


CacheChange = Stored | Evicted | Cleared
