"""The two ends of a hand-off, as the tiers use them: see ``send_session`` and ``receive_session``."""

from __future__ import annotations

from kvtransfer.intake import PEER_LOST, Intake, Refusal, Reservation, SendEvents
from kvtransfer.receive_session import ReceiveSession
from kvtransfer.send_session import Connect, SendSession

__all__ = [
    "PEER_LOST",
    "Connect",
    "Intake",
    "ReceiveSession",
    "Refusal",
    "Reservation",
    "SendEvents",
    "SendSession",
]
