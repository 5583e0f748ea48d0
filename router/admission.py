"""The door: how many requests may be in the router, and what an accepted one gets (an id, a seed).

Knows counts. Whether a worker has room is the policy's question.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable

from proto.errors import Overloaded, Unavailable
from proto.ids import Epoch, RequestId, RequestIds
from proto.request import Request
from router.contract import NewRequest

RETRY_AFTER_S = 1.0


def seeds_from(seed: int | None) -> Callable[[], int]:
    """Draws seeds: the same ones in the same order for the same ``seed``, or by chance."""
    source = random.SystemRandom() if seed is None else random.Random(seed)
    return functools.partial(source.getrandbits, 64)


class Admission:
    """Admits up to ``max_inflight`` requests at once. Every admitted request ``leave``s exactly once."""

    def __init__(self, router_epoch: Epoch, max_inflight: int, draw_seed: Callable[[], int]) -> None:
        self._ids = RequestIds(router_epoch)
        self._max_inflight = max_inflight
        self._draw_seed = draw_seed
        self._inside: set[RequestId] = set()
        self._closed = False

    @property
    def num_inflight(self) -> int:
        return len(self._inside)

    def admit(self, new: NewRequest) -> Request:
        """Gives it an id of its own, and a seed if it has none. Raises Overloaded, or Unavailable once closed."""
        if self._closed:
            raise Unavailable("the router is shutting down", retry_after_s=RETRY_AFTER_S)
        if len(self._inside) >= self._max_inflight:
            raise Overloaded(f"{self._max_inflight} requests are in flight already", retry_after_s=RETRY_AFTER_S)
        params = new.params
        if params.seed is None:
            params = dataclasses.replace(params, seed=self._draw_seed())
        request = Request(
            id=self._ids.next(),
            prompt=new.prompt,
            params=params,
            cache_salt=new.cache_salt,
            priority=new.priority,
        )
        self._inside.add(request.id)
        return request

    def leave(self, request: RequestId) -> None:
        """The request is over. Raises KeyError if it was not inside: that would be our bug."""
        self._inside.remove(request)

    def close(self) -> None:
        """No new request from here on; those inside may finish."""
        self._closed = True
