"""The names of the ledger's keys. Knows nothing of what lies under them."""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.ledger.records import DEVICE


@dataclass(frozen=True, slots=True)
class Keys:
    """The name of every key of one namespace."""

    namespace: str

    @property
    def nonce(self) -> str:
        return f"{self.namespace}:nonce"

    @property
    def workers(self) -> str:
        return f"{self.namespace}:workers"

    @property
    def events(self) -> str:
        return f"{self.namespace}:events"

    @property
    def handoffs(self) -> str:
        return f"{self.namespace}:handoffs"

    def worker(self, worker: str) -> str:
        return f"{self.namespace}:worker:{worker}"

    def sequence(self, epoch: str) -> str:
        return f"{self.namespace}:sequence:{epoch}"

    def inventory(self, epoch: str) -> str:
        return f"{self.namespace}:inventory:{DEVICE}:{epoch}"

    def staging(self, epoch: str) -> str:
        return f"{self.namespace}:staging:{DEVICE}:{epoch}"

    def handoff(self, request: str) -> str:
        return f"{self.namespace}:handoff:{request}"
