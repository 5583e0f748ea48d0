"""What the ledger answers to its writers and readers. Knows nothing of Redis."""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.ledger.records import WorkerRecord


class OutOfStep(Exception):
    """The ledger's inventory is not the one this change applies to: write it anew as a whole."""


class NotRegistered(Exception):
    """This incarnation is not on the ledger (any more): register, then write the inventory as a whole."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What Redis said to a heartbeat. ``accepted`` is false when a newer incarnation has the worker's name.

    ``nonce`` changes when Redis was emptied. ``sequence`` is that of the last inventory event; None: no inventory.
    """

    accepted: bool
    nonce: str
    sequence: int | None


@dataclass(frozen=True, slots=True)
class Members:
    """Who is on the ledger, with the sequence of each one's inventory, as of event ``tail``."""

    nonce: str
    tail: str
    workers: tuple[tuple[WorkerRecord, int | None], ...]


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Totals since this client was made."""

    num_refused: int = 0
    """Hand-off writes that were not above what was recorded."""
    num_malformed: int = 0
    """Records and events that could not be read, and were skipped."""
