"""What a process counts of its dealings with the ledger: what every process does, and what only workers do."""

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


class PublisherCounts(Protocol):
    """Totals (``kvtransfer.ledger.publisher``)."""

    @property
    def num_replays(self) -> int: ...

    @property
    def num_overflows(self) -> int: ...

    @property
    def num_superseded(self) -> int: ...


def show_ledger(page: MetricsPage, read: Callable[[], LedgerCounts], num_dropped: Callable[[], int]) -> None:
    """Once per page. ``num_dropped``: hand-off records that were not kept while Redis was away."""
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
    page.show_total(
        "tandem_ledger_dropped_records", "Hand-off records dropped, since too many waited to be written.", num_dropped
    )


def show_publisher(page: MetricsPage, read: Callable[[], PublisherCounts]) -> None:
    """A worker's part of the ledger. Once per page."""
    page.show_total(
        "tandem_ledger_inventories",
        "Times that all of the prefix cache's hashes were written: one at the start, more after losses.",
        lambda: read().num_replays,
    )
    page.show_total(
        "tandem_ledger_inventory_overflows",
        "Times that too many changes of the prefix cache waited to be written.",
        lambda: read().num_overflows,
    )
    page.show_total(
        "tandem_ledger_superseded_heartbeats",
        "Heartbeats not taken, as a newer process has this worker's name.",
        lambda: read().num_superseded,
    )
