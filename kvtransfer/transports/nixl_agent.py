"""NIXL, by its own Python package: what ``nixl`` needs of it and nothing more.

The package is an extra: where it is missing, NixlUnavailable says how to get it. One agent is one name and one UCX
worker. One that shares memory has a thread of the library's that answers where the network needs P's help (TCP), and
that takes a core; one that only reads does without, and moves its READs on when it looks at them.
"""

from __future__ import annotations

import functools
import importlib
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from kvtransfer.transports.nixl_landing import MAX_METADATA_BYTES, NixlBroken, NixlUnavailable, Reading, Region

BACKEND = "UCX"


class _Handle(Protocol):
    def release(self) -> None: ...


class _Library(Protocol):
    """What is used of a ``nixl_agent``. Its errors have no common base but Exception."""

    backends: dict[str, object]

    def register_memory(self, reg_list: list[tuple[int, int, int, str]], mem_type: str) -> object: ...

    def deregister_memory(self, dereg_list: object) -> None: ...

    def get_agent_metadata(self) -> bytes: ...

    def add_remote_agent(self, metadata: bytes) -> bytes: ...

    def remove_remote_agent(self, agent: str) -> None: ...

    def get_xfer_descs(self, descs: list[tuple[int, int, int]], mem_type: str) -> object: ...

    def initialize_xfer(
        self, operation: str, local_descs: object, remote_descs: object, remote_agent: str
    ) -> _Handle: ...

    def transfer(self, handle: _Handle) -> str: ...

    def check_xfer_state(self, handle: _Handle) -> str: ...


class NixlAgent:
    """An ``Agent``. ``shares``: others read from it. Raises NixlUnavailable where the library is not here."""

    def __init__(self, *, shares: bool) -> None:
        self._library = _make(shares)
        self._metadata: dict[Region, bytes] = {}
        self._registered: dict[Region, object] = {}
        self._peers: set[str] = set()
        self._changing = threading.Lock()

    def share(self, memory: Region) -> bytes:
        with self._changing:
            if memory not in self._metadata:
                with _naming(NixlUnavailable, "cannot share this memory"):
                    self._register(memory)
                    self._metadata[memory] = self._library.get_agent_metadata()
            metadata = self._metadata[memory]
        if len(metadata) > MAX_METADATA_BYTES:
            raise NixlUnavailable(f"{len(metadata)} bytes of metadata are more than a peer takes")
        return metadata

    def register(self, memory: Region) -> None:
        with self._changing, _naming(NixlBroken, "cannot register memory"):
            self._registered[memory] = self._register(memory)

    def unregister(self, memory: Region) -> None:
        with self._changing, suppress(Exception):  # where it fails there is nothing left to give back
            self._library.deregister_memory(self._registered.pop(memory))

    def meet(self, metadata: bytes) -> str:
        with self._changing, _naming(NixlBroken, "cannot meet the peer"):
            name = self._library.add_remote_agent(metadata).decode()
            if name in self._peers:
                raise NixlBroken("another peer has its name")
            self._peers.add(name)
            return name

    def part(self, peer: str) -> None:
        with self._changing, suppress(Exception):  # it has gone by itself
            self._peers.discard(peer)
            self._library.remove_remote_agent(peer)

    def read(self, peer: str, theirs: Sequence[Region], ours: Sequence[Region]) -> Reading:
        with _naming(NixlBroken, "cannot read"):
            handle = self._library.initialize_xfer("READ", self._descriptors(ours), self._descriptors(theirs), peer)
        return _Reading(self._library, handle)

    def _register(self, memory: Region) -> object:
        return self._library.register_memory([(memory.address, memory.num_bytes, memory.device, "")], memory.kind)

    def _descriptors(self, regions: Sequence[Region]) -> object:
        """Of one kind, all of them."""
        places = [(region.address, region.num_bytes, region.device) for region in regions]
        return self._library.get_xfer_descs(places, regions[0].kind)


@functools.cache
def sharing_agent() -> NixlAgent:
    """The one agent of this process that others read from, made when it is first wanted. Raises NixlUnavailable."""
    return NixlAgent(shares=True)


class _Reading:
    """The handle is released when the READ is over, and not before: that would not end it, only hide its end."""

    def __init__(self, library: _Library, handle: _Handle) -> None:
        self._library = library
        self._handle = handle
        self._is_posted = False

    def is_done(self) -> bool:
        look = self._library.check_xfer_state if self._is_posted else self._library.transfer
        self._is_posted = True
        try:
            with _naming(NixlBroken, "the peer's memory cannot be read"):
                state = look(self._handle)
        except NixlBroken:
            self._release()
            raise
        if state == "PROC":
            return False
        self._release()
        if state != "DONE":
            raise NixlBroken("the READ has failed")
        return True

    def _release(self) -> None:
        with suppress(Exception):  # the library keeps what it cannot release
            self._handle.release()


def _make(shares: bool) -> _Library:
    try:
        api = importlib.import_module("nixl._api")
    except ImportError as error:
        raise NixlUnavailable(f"NIXL cannot be loaded ({error}): pip install 'tandem-serve[nixl]'") from error
    # It writes to standard output of its own accord; what it has to say belongs into our log.
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    strict = api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    config = api.nixl_agent_config(enable_prog_thread=shares, backends=[BACKEND], sync_mode=strict)
    with _naming(NixlUnavailable, "NIXL cannot be started"):
        library: _Library = api.nixl_agent(f"tandem-{secrets.token_hex(8)}", config)
    if BACKEND not in library.backends:
        raise NixlUnavailable(f"this NIXL comes without {BACKEND}")
    return library


@contextmanager
def _naming(kind: type[NixlBroken] | type[NixlUnavailable], wish: str) -> Iterator[None]:
    try:
        yield
    except (NixlBroken, NixlUnavailable):
        raise
    except Exception as error:
        raise kind(f"{wish}: {error}") from error
