"""Recomputes the ledger from scratch and compares: the counterpart of ``check_integrity()`` of the pools.

Has a Redis client of its own and shares no code path with the writers, only the names of keys and the records' bytes.
For tests and for a suspicious operator; reads every key of the namespace, so not for a hot path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from redis.asyncio import Redis

from kvtransfer.ledger.keys import Keys
from kvtransfer.ledger.records import InventoryEvent, Replaced, decode_event, decode_handoff, decode_worker
from proto.ids import BlockHash, Epoch
from proto.inventory import Cleared, Evicted, Stored


class LedgerInconsistent(Exception):
    """What the ledger holds contradicts itself. The message lists every finding."""


@dataclass(slots=True)
class _Mirror:
    """One inventory replayed from its events. ``base`` is None after a Replaced, whose content the stream lacks."""

    sequence: int = 0
    base: frozenset[BlockHash] | None = frozenset()
    told: dict[BlockHash, bool] = field(default_factory=dict)
    """The blocks named since ``base``, and whether their last event stored them."""

    def apply(self, event: InventoryEvent) -> None:
        self.sequence = event.sequence
        match event.change:
            case Stored(hashes):
                self.told.update(dict.fromkeys(hashes, True))
            case Evicted(hashes):
                self.told.update(dict.fromkeys(hashes, False))
            case Cleared():
                self.base, self.told = frozenset(), {}
            case Replaced():
                self.base, self.told = None, {}

    def contradicts(self, actual: frozenset[BlockHash]) -> bool:
        base = actual if self.base is None else self.base
        stored = {block for block, is_stored in self.told.items() if is_stored}
        return actual != (base - self.told.keys()) | stored


class LedgerAudit:
    """An async context manager. Each ``check`` replays the events since the one before it, so make it early.

    Nobody may write while a check runs.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._redis = Redis.from_url(url, protocol=2)
        self._keys = Keys(namespace)
        self._cursor = "0-0"
        self._mirrors: dict[Epoch, _Mirror] = {}

    async def __aenter__(self) -> LedgerAudit:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            await self._redis.aclose()

    async def check(self) -> None:
        """Raises LedgerInconsistent. Malformed records raise RemoteProtocolError."""
        workers = {
            name.decode(): Epoch(epoch.decode())
            for name, epoch in (await self._ask("HGETALL", self._keys.workers)).items()
        }
        findings = [
            *await self._check_lifetimes(set(workers.values())),
            *await self._check_workers(workers),
            *await self._check_inventories(set(workers.values())),
            *await self._check_handoffs(),
        ]
        if findings:
            raise LedgerInconsistent("; ".join(findings))

    async def _check_lifetimes(self, epochs: set[Epoch]) -> list[str]:
        """Every key either is one of the four lasting ones or ends by itself, and belongs to somebody."""
        lasting = {self._keys.nonce, self._keys.workers, self._keys.events, self._keys.handoffs}
        owned = (self._keys.sequence(""), self._keys.inventory(""))
        findings = []
        async for raw in self._redis.scan_iter(match=f"{self._keys.namespace}:*", count=1000):
            key = raw.decode()
            if key not in lasting and await self._ask("TTL", key) == -1:
                findings.append(f"{key} would stay for ever")
            if key.startswith(owned) and key.rpartition(":")[2] not in epochs:
                findings.append(f"{key} belongs to no worker")
        return findings

    async def _check_workers(self, workers: Mapping[str, Epoch]) -> list[str]:
        findings = []
        for worker, epoch in workers.items():
            data = await self._ask("GET", self._keys.worker(worker))
            record = None if data is None else decode_worker(data)  # None: expired, not tidied yet
            if record is not None and (record.worker, record.epoch) != (worker, epoch):
                findings.append(f"{worker} is held by {epoch}, but its record is of {record.worker} {record.epoch}")
        return findings

    async def _check_inventories(self, epochs: Iterable[Epoch]) -> list[str]:
        findings = await self._replay()
        for epoch in epochs:
            sequence = await self._ask("GET", self._keys.sequence(epoch))
            actual = frozenset(BlockHash(block) for block in await self._ask("SMEMBERS", self._keys.inventory(epoch)))
            if sequence is None:
                if actual:
                    findings.append(f"{epoch} has {len(actual)} blocks and no sequence")
                continue
            mirror = self._mirrors.setdefault(epoch, _Mirror(sequence=int(sequence), base=actual))
            if int(sequence) != mirror.sequence:
                findings.append(f"{epoch} is at event {int(sequence)}, its stream at {mirror.sequence}")
            elif mirror.contradicts(actual):
                findings.append(f"{epoch} has not the blocks that its events say")
            mirror.base, mirror.told = actual, {}
        return findings

    async def _replay(self) -> list[str]:
        findings: list[str] = []
        seen: set[Epoch] = set()
        can_be_trimmed = not await self._has(self._cursor)
        entries = await self._ask("XRANGE", self._keys.events, f"({self._cursor}", "+")
        for entry_id, fields in entries:
            self._cursor = entry_id.decode()
            event = decode_event(fields)
            if not isinstance(event, InventoryEvent):
                continue
            mirror = self._mirrors.setdefault(event.epoch, _Mirror())
            if event.sequence != mirror.sequence + 1 and not isinstance(event.change, Replaced):
                if event.epoch in seen or not can_be_trimmed:
                    findings.append(f"{event.epoch} jumps from event {mirror.sequence} to {event.sequence}")
                mirror.base, mirror.told = None, {}
            mirror.apply(event)
            seen.add(event.epoch)
        return findings

    async def _has(self, entry_id: str) -> bool:
        """Whether the stream still reaches back to ``entry_id``, so that nothing after it can have been trimmed."""
        return bool(await self._ask("XRANGE", self._keys.events, entry_id, entry_id))

    async def _check_handoffs(self) -> list[str]:
        findings = []
        listed = {member.decode() for member in await self._ask("ZRANGE", self._keys.handoffs, 0, -1)}
        living = set()
        prefix = self._keys.handoff("")
        async for raw in self._redis.scan_iter(match=f"{prefix}*", count=1000):
            generation, rank, data = await self._ask("HMGET", raw, "generation", "rank", "record")
            record = decode_handoff(data)
            if (int(generation), int(rank)) != record.order or raw.decode() != prefix + record.request:
                findings.append(f"{raw.decode()} is filed as {int(generation)}/{int(rank)}, but holds {record}")
            if not record.stage.is_terminal:
                living.add(record.request)
            elif record.request in listed:
                findings.append(f"{record.request} is open and {record.stage.value}")
        findings += [f"{request} is under way and not listed" for request in living - listed]
        return findings

    async def _ask(self, *command: str | bytes | int) -> Any:
        return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
