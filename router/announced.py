"""Prompts that were announced to a decode worker and have no room there yet: they wait for their turn on a prefill
worker, or, computed, for the decode worker.

    placed ──▶ counted ──a block travels, or the decode worker has a word of it──▶ its load shows it
                  └── placed anew, or over

No load report shows them, and a newcomer comes behind them. Knows what this router sent; decides nothing.
"""

from __future__ import annotations

from proto.ids import Epoch, RequestId
from proto.lifecycle import Stage


class Announced:
    """One entry per request at most. Every call may be repeated."""

    def __init__(self) -> None:
        self._entries: dict[RequestId, tuple[Epoch, int]] = {}
        self._totals: dict[Epoch, int] = {}

    def place(self, request: RequestId, epoch: Epoch, num_tokens: int) -> None:
        """``epoch`` is to make room for ``num_tokens``. What was announced for this request before is not."""
        self.forget(request)
        self._entries[request] = (epoch, num_tokens)
        self._totals[epoch] = self._totals.get(epoch, 0) + num_tokens

    def progressed(self, request: RequestId, epoch: Epoch, stage: Stage) -> None:
        """``epoch`` says that the request is in ``stage``: blocks travel only to who has room, and a decode worker has
        nothing to say of a prompt before."""
        entry = self._entries.get(request)
        if entry is not None and (stage is Stage.STREAMING or entry[0] == epoch):
            self.forget(request)

    def forget(self, request: RequestId) -> None:
        entry = self._entries.pop(request, None)
        if entry is not None:
            epoch, num_tokens = entry
            self._totals[epoch] -= num_tokens
            if not self._totals[epoch]:
                del self._totals[epoch]

    def before(self, request: RequestId) -> dict[Epoch, int]:
        """Tokens per decode worker; those of ``request`` itself do not stand in its way."""
        totals = dict(self._totals)
        if request in self._entries:
            epoch, num_tokens = self._entries[request]
            totals[epoch] -= num_tokens
        return totals
