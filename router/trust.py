"""A worker's budget of faults: who fails most of what it is given is left alone for a while, and then tried again.

    trusted ──budget spent──▶ out, for FIRST_PAUSE_S, then twice that, ... ──over, and its probe answers──▶ on probation
       ▲                       ▲                                                                                │  │
       └──── a request is served there ─────────────────────────────────────────────────────────────────────────┘  │
                               └──────────────────────────── one fault ────────────────────────────────────────────┘

Old faults fade, and successes weigh against them, so a busy worker is not sent away for a few.
Knows counts and seconds.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_FAULTS = 5.0
"""Faults that a worker may have, lately."""
MAX_SHARE = 0.5
"""Share of its tries that may fail, lately, before that counts."""
HALF_LIFE_S = 30.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


class Trust:
    """``failed`` and ``served`` as it happens; ``is_out`` says whether to avoid it; ``probed`` lets it back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._faults = 0.0
        self._served = 0.0
        self._at = clock()
        self._num_pauses = 0
        self._out_until: float | None = None
        self._back_since: float | None = None
        self._on_probation = False

    @property
    def is_out(self) -> bool:
        return self._out_until is not None

    @property
    def is_untouched(self) -> bool:
        """Nothing speaks against it: to forget it makes no difference."""
        self._fade()
        return not self.is_out and not self._num_pauses and self._faults < 0.1

    def failed(self) -> bool:
        """A try failed there. Whether that sends it out."""
        if self.is_out:
            return False
        self._fade()
        self._faults += 1.0
        is_spent = self._faults >= MAX_FAULTS and self._faults >= MAX_SHARE * (self._faults + self._served)
        if self._on_probation or is_spent:
            self._send_out()
        return self.is_out

    def served(self) -> None:
        """A request is complete in which it had a part."""
        self._fade()
        self._served += 1.0
        if self._on_probation:
            self._on_probation = False
            self._faults = 0.0

    def probed(self, *, is_well: bool) -> bool:
        """It was asked how it is. Whether that lets it back."""
        if self._out_until is None or self._clock() < self._out_until:
            return False
        if not is_well:
            self._out_until = self._clock() + FIRST_PAUSE_S
            return False
        self._out_until = None
        self._on_probation = True
        self._back_since = self._clock()
        return True

    def _send_out(self) -> None:
        now = self._clock()
        if self._back_since is not None and now - self._back_since > LONGEST_PAUSE_S:
            self._num_pauses = 0
        pause = min(FIRST_PAUSE_S * 2.0 ** min(self._num_pauses, 10), LONGEST_PAUSE_S)
        self._num_pauses += 1
        self._out_until = now + pause
        self._on_probation = False
        self._faults = self._served = 0.0

    def _fade(self) -> None:
        now = self._clock()
        share = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._faults *= share
        self._served *= share
        self._at = now
        if not self.is_out and self._back_since is not None and now - self._back_since > LONGEST_PAUSE_S:
            self._num_pauses = 0
