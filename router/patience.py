"""How often a request without a worker asks again, and when it has waited long enough. Knows seconds only."""

from __future__ import annotations

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class Patience:
    """Pauses double from FIRST_PAUSE_S to LONGEST_PAUSE_S until something moves on (``moved_on``)."""

    def __init__(self, alone_s: float, room_s: float) -> None:
        self._alone_s = alone_s
        self._room_s = room_s
        self._num_pauses = 0
        self._alone_since: float | None = None
        self._refused_since: float | None = None

    def pause(self, at_least: float | None = None) -> float:
        """Seconds to wait now."""
        grown = FIRST_PAUSE_S * 2.0 ** min(self._num_pauses, 10)
        self._num_pauses += 1
        return max(min(grown, LONGEST_PAUSE_S), at_least or 0.0)

    def alone(self, now: float) -> bool:
        """There is no worker at all: whether to wait on."""
        self._alone_since = now if self._alone_since is None else self._alone_since
        return now - self._alone_since < self._alone_s

    @property
    def is_refused(self) -> bool:
        """A decode worker had no room for its blocks, and none has taken them since."""
        return self._refused_since is not None

    def refused(self, now: float) -> bool:
        """A decode worker had no room for blocks that are computed: whether to ask on."""
        self._refused_since = now if self._refused_since is None else self._refused_since
        return now - self._refused_since < self._room_s

    def placed(self) -> None:
        """A worker was found."""
        self._alone_since = None

    def moved_on(self) -> None:
        """A decode worker has the request, or generates."""
        self._num_pauses = 0
        self._refused_since = None
