"""The Lua that makes each write of the ledger one atomic step. Knows where the scripts are, and their digests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the SHA-1 under which Redis caches it."""

    text: str
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        text = resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Scripts:
    """Every script of the ledger, by file name."""

    heartbeat: Script
    deregister: Script
    members: Script
    publish: Script
    replace: Script
    advance: Script

    @classmethod
    def load(cls) -> Scripts:
        return cls(**{name: Script.load(name) for name in cls.__slots__})
