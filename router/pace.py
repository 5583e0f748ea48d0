"""How fast decode workers speak and how long answers are, as this router sees it. Knows averages; decides nothing."""

from __future__ import annotations

from proto.ids import Epoch, RequestId

_NEW = 0.1
"""Weight of what is new in a moving average."""


class Pace:
    """Feed it tokens as they come. Forgets what is over."""

    def __init__(self) -> None:
        self._last: dict[RequestId, tuple[Epoch, float]] = {}
        self._itl_s: dict[Epoch, float] = {}
        self.output_tokens = 0.0
        """Tokens of a choice, on the average of those that are complete; 0 while none is."""

    @property
    def itl_s(self) -> dict[Epoch, float]:
        """Seconds between two tokens of a request, by decode worker; absent where none was heard twice."""
        return self._itl_s

    def heard(self, epoch: Epoch, request: RequestId, now: float) -> None:
        """``epoch`` has sent tokens of ``request``, one step's."""
        last, self._last[request] = self._last.get(request), (epoch, now)
        if last is not None and last[0] == epoch:
            gap = now - last[1]
            self._itl_s[epoch] = gap + (1 - _NEW) * (self._itl_s.get(epoch, gap) - gap)

    def complete(self, num_tokens: float) -> None:
        self.output_tokens = num_tokens + (1 - _NEW) * ((self.output_tokens or num_tokens) - num_tokens)

    def forget(self, request: RequestId) -> None:
        self._last.pop(request, None)

    def gone(self, epoch: Epoch) -> None:
        self._itl_s.pop(epoch, None)
