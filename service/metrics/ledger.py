"""What a process's client of the ledger counts, the same on a router and on a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from service.metrics.registry import MetricsPage


class LedgerCounts(Protocol):
    """Totals (``kvtransfer.ledger.replies``)."""

    @property
    def num_refused(self) -> int: ...

    @property
    def num_malformed(self) -> int: ...


def show_ledger(page: MetricsPage, read: Callable[[], LedgerCounts]) -> None:
    """Once per page."""
    page.show_total(
        "tandem_ledger_refused_writes",
        "Hand-off records that were not written: as far, or further, was recorded before.",
        lambda: read().num_refused,
    )
    page.show_total(
        "tandem_ledger_malformed_entries",
        "Entries of the ledger that could not be read, and were skipped.",
        lambda: read().num_malformed,
    )
