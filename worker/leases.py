"""Leases on a worker's own monotonic timer: what is not renewed in time is let go.

    granted ──renewed──▶ granted ... ──not renewed──▶ expired
                            └─ its router's stream ends: soon, unless the router comes back and renews it by name

What is granted while the router is away, to a prefill worker's offer say, is for as short a time.

Knows names and deadlines; what letting go means is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proto.ids import Epoch, Generation, RequestId, router_of

ROUTER_AWAY_S = 5.0
"""How long leases outlive their router's stream: a router that has not come back in a second has gone on without us."""

Orphaned = Callable[[RequestId, Generation], None]
"""Hears of tries that ended here without a router, so that what it wrote of them on the ledger is closed for it."""


class Leases:
    """One timer for all leases. ``on_expired`` is called once per lease that ran out, on the event loop.

    ``is_here``: whether the request's router has a stream to this worker.
    """

    def __init__(
        self,
        on_expired: Callable[[RequestId], None],
        is_here: Callable[[RequestId], bool] = lambda request: True,
        *,
        away_s: float = ROUTER_AWAY_S,
    ) -> None:
        self._on_expired = on_expired
        self._is_here = is_here
        self._away_s = away_s
        self._deadlines: dict[RequestId, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0
        """Of the timer. uvloop's handles do not say it where the time has come already."""

    def __contains__(self, request: RequestId) -> bool:
        return request in self._deadlines

    def __len__(self) -> int:
        return len(self._deadlines)

    def grant(self, request: RequestId, lease_s: float) -> None:
        """Starts a lease, or restarts it at ``lease_s`` from now."""
        if not self._is_here(request):
            lease_s = min(lease_s, self._away_s)
        self._deadlines[request] = deadline = asyncio.get_running_loop().time() + lease_s
        self._arm(deadline)

    def renew(self, request: RequestId, lease_s: float) -> None:
        """Like ``grant``, for a lease that still runs; a lease that ended stays ended."""
        if request in self._deadlines:
            self.grant(request, lease_s)

    def router_left(self, router: Epoch) -> None:
        """Its stream has ended: what it does not renew soon ends."""
        until = asyncio.get_running_loop().time() + self._away_s
        for request, deadline in self._deadlines.items():
            if router_of(request) == router:
                self._deadlines[request] = min(deadline, until)
        self._arm_anew()

    def end(self, request: RequestId) -> None:
        """Ends a lease without calling ``on_expired``. May be called twice."""
        self._deadlines.pop(request, None)

    def close(self) -> None:
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, deadline: float) -> None:
        """The timer never fires later than the earliest deadline; after renewals it may fire early, and re-arms."""
        if self._timer is not None:
            if self._fires_at <= deadline:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)
        self._fires_at = deadline

    def _arm_anew(self) -> None:
        if self._deadlines:
            self._arm(min(self._deadlines.values()))

    def _expire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for request in [request for request, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[request]
            self._on_expired(request)
        self._arm_anew()
