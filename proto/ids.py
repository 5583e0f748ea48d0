"""The names things go by. Knows how ids are made; knows nothing about what they name."""

from __future__ import annotations

import itertools
import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""One accepted request: ``<router epoch>.<counter>``. Never client input; X-Request-ID is a label beside it."""

WorkerId = NewType("WorkerId", str)
"""A worker's stable name within a deployment. The same name may return under another epoch."""

Epoch = NewType("Epoch", str)
"""A nonce drawn once per process incarnation; equal epochs mean the same memory."""

Generation = NewType("Generation", int)
"""Counts the tries of one request, from 1, by the one router that owns it. The lower generation loses."""

BlockId = NewType("BlockId", int)
"""Index of a block in one worker's KV memory. Means nothing outside that worker."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that identify the tokens of a block and of everything before it (see ``proto.hashing``)."""


def new_epoch() -> Epoch:
    """A fresh 64-bit nonce in hex."""
    return Epoch(secrets.token_hex(8))


class RequestIds:
    """Hands out request ids that are unique across routers and across restarts of one router."""

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._counter = itertools.count(1)

    def next(self) -> RequestId:
        return RequestId(f"{self._epoch}.{next(self._counter)}")


def router_of(request: RequestId) -> Epoch:
    """The epoch of the router that owns ``request``."""
    return Epoch(request.rpartition(".")[0])


def try_id(request: RequestId, generation: Generation) -> RequestId:
    """What a worker's engine calls one try of a request, so that news of an older try is never taken for this one's."""
    return RequestId(f"{request}#{generation}")
