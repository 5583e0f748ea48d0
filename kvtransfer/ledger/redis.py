"""The ledger's keys, and every read and write of them. The only file that speaks to Redis.

Knows keys, scripts, TTLs and Redis' failures, all of which become LedgerAway. Does not know when to write, what to do
when Redis is away, or what a record is for. Needs one Redis 6.2 or later (or Valkey), not a cluster: scripts touch
several keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisError

from kvtransfer.ledger.keys import Keys
from kvtransfer.ledger.records import (
    DEVICE,
    HandoffRecord,
    LedgerAway,
    LedgerEvent,
    Snapshot,
    WorkerRecord,
    decode_event,
    decode_handoff,
    decode_worker,
    encode_change,
    encode_handoff,
    encode_worker,
)
from kvtransfer.ledger.replies import Heartbeat, LedgerCounts, Members, NotRegistered, OutOfStep
from kvtransfer.ledger.scripts import Script, Scripts
from proto.errors import RemoteProtocolError, SettingsError
from proto.hashing import HASH_BYTES
from proto.ids import BlockHash, Epoch, RequestId, WorkerId
from proto.inventory import CacheChange
from proto.settings import LedgerSettings

log = logging.getLogger(__name__)

MOST_HASHES_PER_EVENT = 256
"""Bounds a stream entry to some 4 KB, and so the stream to about MAXLEN times that."""

_STAGE_CHUNK = 4096
_STAGING_TTL_MS = 60_000
_OUT_OF_STEP = -1
_NOT_REGISTERED = -2
_T = TypeVar("_T")


class RedisLedger:
    """One process's view of one namespace of the ledger.

    Every call raises LedgerAway when Redis does not answer within ``timeout_s``, and every write (``members`` is one)
    when Redis takes none; nothing else goes wrong with a call but what it says. May be shared by all tasks of one event
    loop.

    ``ttl_s``: how long a worker outlives its last heartbeat. ``handoff_ttl_s`` and ``tombstone_ttl_s``: how long an
    open and a closed hand-off are kept; both should outlive a request. ``most_events``: about how many are kept.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        ttl_s: float = 5.0,
        handoff_ttl_s: float = 660.0,
        tombstone_ttl_s: float = 660.0,
        most_events: int = 4096,
        timeout_s: float = 2.0,
    ) -> None:
        if not namespace or ":" in namespace:
            raise SettingsError(f"a ledger's namespace must be non-empty and hold no ':', got {namespace!r}")
        self.keys = Keys(namespace)
        self.ttl_s = ttl_s
        self._ttl_ms = _milliseconds(ttl_s)
        self._handoff_ttl_ms = _milliseconds(handoff_ttl_s)
        self._tombstone_ttl_ms = _milliseconds(tombstone_ttl_s)
        self._most_events = most_events
        self._timeout_s = timeout_s
        self._scripts = Scripts.load()
        self._num_refused = 0
        self._num_malformed = 0
        self._redis = _client(url, timeout_s)

    @classmethod
    def from_settings(cls, settings: LedgerSettings) -> RedisLedger:
        """Raises SettingsError when no Redis is named, or its URL is malformed."""
        if settings.redis is None:
            raise SettingsError("no Redis is given: set --redis, TANDEM_REDIS or REDIS_URL")
        return cls(settings.redis, settings.namespace, ttl_s=settings.heartbeat_ttl_s)

    @property
    def host(self) -> str | None:
        """Where Redis is, as its URL says; None: on this host, behind a unix socket."""
        place = self._redis.connection_pool.connection_kwargs
        return None if "path" in place else place.get("host", "localhost")

    @property
    def counts(self) -> LedgerCounts:
        return LedgerCounts(self._num_refused, self._num_malformed)

    async def connect(self) -> None:
        """Asks whether Redis is there and fit for a ledger, and warns of one that evicts. Other calls connect too, so
        LedgerAway from here is no reason to give up. Raises SettingsError when Redis is there but does not let us in.
        """
        try:
            memory = await self._ask(lambda redis: redis.info("memory"))
        except LedgerAway as error:
            if (refusal := _refusal_among(error)) is not None:
                raise SettingsError(f"Redis wants another user or password in its URL: {refusal}") from error
            raise
        policy = memory.get("maxmemory_policy", "unknown")
        if policy != "noeviction":
            log.warning("Redis evicts keys when full (maxmemory-policy is %s): set it to noeviction", policy)

    async def close(self) -> None:
        """Drops the connections. May be called twice."""
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.aclose()

    async def __aenter__(self) -> RedisLedger:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    # Workers

    async def register(self, record: WorkerRecord) -> Heartbeat:
        """A heartbeat that takes the worker's name over from any earlier incarnation. May be repeated."""
        return await self._beat(record, takeover=True)

    async def heartbeat(self, record: WorkerRecord) -> Heartbeat:
        """Renews the record and all that lives with it. Takes a free name, but none that another incarnation holds."""
        return await self._beat(record, takeover=False)

    async def _beat(self, record: WorkerRecord, *, takeover: bool) -> Heartbeat:
        keys = self.keys
        accepted, nonce, sequence = await self._run(
            self._scripts.heartbeat,
            [*self._worker_keys(record.worker, record.epoch), keys.nonce],
            [
                record.worker,
                record.epoch,
                encode_worker(record),
                self._ttl_ms,
                self._most_events,
                secrets.token_hex(8),
                int(takeover),
                keys.sequence(""),
                keys.inventory(""),
            ],
        )
        return Heartbeat(bool(accepted), nonce.decode(), None if sequence < 0 else sequence)

    async def deregister(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Takes this incarnation off at once, inventory included. False when it was not on the ledger."""
        keys = self._worker_keys(worker, epoch)
        return bool(await self._run(self._scripts.deregister, keys, [worker, epoch, self._most_events]))

    async def members(self) -> Members:
        """Who is on the ledger now. Records that cannot be read are skipped and counted."""
        keys = self.keys
        nonce, tail, *pairs = await self._run(
            self._scripts.members,
            [keys.workers, keys.nonce, keys.events],
            [secrets.token_hex(8), keys.worker(""), keys.sequence("")],
        )
        workers = []
        for data, sequence in zip(pairs[::2], pairs[1::2], strict=True):
            record = self._readable(decode_worker, data)
            if record is not None:
                workers.append((record, None if sequence < 0 else sequence))
        return Members(nonce.decode(), tail.decode(), tuple(workers))

    async def workers(self) -> list[WorkerRecord]:
        return [record for record, _ in (await self.members()).workers]

    # Inventories

    async def publish(self, worker: WorkerId, epoch: Epoch, first: int, changes: Sequence[CacheChange]) -> int:
        """Applies and announces ``changes``, numbered from ``first``, all or none; returns the last number.

        May be repeated as it was after LedgerAway. No change may have more than MOST_HASHES_PER_EVENT hashes.
        Raises OutOfStep, NotRegistered.
        """
        encoded = [part for change in changes for part in encode_change(change)]
        return _checked_sequence(
            await self._run(
                self._scripts.publish,
                self._worker_keys(worker, epoch),
                [worker, epoch, DEVICE, self._most_events, first, *encoded],
            )
        )

    async def replace(self, worker: WorkerId, epoch: Epoch, sequence: int, hashes: Iterable[BlockHash]) -> int:
        """Puts ``hashes`` in the place of the whole inventory, as event ``sequence``, which must be a fresh one.

        Sent in parts, applied at once. Raises NotRegistered; LedgerAway too when the parts did not all stay.
        """
        unique = list(set(hashes))
        staging = self.keys.staging(epoch)
        await self._ask(lambda redis: redis.unlink(staging))
        for start in range(0, len(unique), _STAGE_CHUNK):
            async with self._asking(), self._redis.pipeline(transaction=True) as part:
                part.sadd(staging, *unique[start : start + _STAGE_CHUNK])
                part.pexpire(staging, _STAGING_TTL_MS)
                await part.execute()
        try:
            return _checked_sequence(
                await self._run(
                    self._scripts.replace,
                    [*self._worker_keys(worker, epoch), staging],
                    [worker, epoch, DEVICE, self._most_events, sequence, len(unique)],
                )
            )
        except OutOfStep:
            raise LedgerAway("an inventory was lost on its way") from None

    async def snapshot(self, epoch: Epoch) -> Snapshot | None:
        """The whole inventory of one incarnation; None when the ledger has none."""
        async with self._asking(), self._redis.pipeline(transaction=True) as both:
            both.get(self.keys.sequence(epoch))
            both.smembers(self.keys.inventory(epoch))
            sequence, members = await both.execute()
        if sequence is None:
            return None
        whole = frozenset(BlockHash(member) for member in members if len(member) == HASH_BYTES)
        self._num_malformed += len(members) - len(whole)
        return Snapshot(whole, int(sequence))

    async def read_events(self, after: str, *, wait_s: float, most: int = 512) -> tuple[list[LedgerEvent], str]:
        """The events after stream id ``after`` (``0-0``: from the oldest kept), and the id to go on from.

        Waits up to ``wait_s`` for a first one, but less where the timeout of a call is near.
        """
        block_ms = _milliseconds(min(wait_s, self._timeout_s / 2))
        reply = await self._ask(lambda redis: redis.xread({self.keys.events: after}, count=most, block=block_ms))
        entries = reply[0][1] if reply else []
        return self._events(entries), entries[-1][0].decode() if entries else after

    async def read_events_until(self, after: str, last: str, *, most: int = 512) -> tuple[list[LedgerEvent], str]:
        """``read_events`` without waiting, and none after ``last``."""
        entries = await self._ask(lambda redis: redis.xrange(self.keys.events, f"({after}", last, count=most))
        return self._events(entries), entries[-1][0].decode() if entries else last

    def _events(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> list[LedgerEvent]:
        events = [self._readable(decode_event, fields) for _, fields in entries]
        return [event for event in events if event is not None]

    # Hand-offs

    async def advance(self, record: HandoffRecord) -> bool:
        """Records that a hand-off came this far. False when refused: as far, or further, was recorded before.

        Repeating the very same write is not refused. A terminal stage ends the record; what stays is a tombstone that
        refuses late writes. A higher generation goes above anything, a tombstone too.
        """
        return (await self.advance_all([record]))[0]

    async def advance_all(self, records: Sequence[HandoffRecord]) -> list[bool]:
        """``advance`` for each, in order, in one round trip."""
        if not records:
            return []
        args: list[str | int | bytes] = [self._handoff_ttl_ms, self._tombstone_ttl_ms]
        for record in records:
            args += [
                record.request,
                record.generation,
                record.rank,
                int(record.stage.is_terminal),
                encode_handoff(record),
            ]
        keys = [self.keys.handoffs, *(self.keys.handoff(record.request) for record in records)]
        held = [bool(each) for each in await self._run(self._scripts.advance, keys, args)]
        self._num_refused += held.count(False)
        return held

    async def handoff(self, request: RequestId) -> HandoffRecord | None:
        """What is recorded of a request, tombstones included."""
        data = await self._ask(lambda redis: redis.hget(self.keys.handoff(request), "record"))
        return None if data is None else self._readable(decode_handoff, data)

    async def open_handoffs(self) -> list[HandoffRecord]:
        """Every hand-off whose stage is not terminal."""
        requests = await self._ask(lambda redis: redis.zrange(self.keys.handoffs, 0, -1))
        async with self._asking(), self._redis.pipeline(transaction=False) as many:
            for request in requests:
                many.hget(self.keys.handoff(request.decode(errors="replace")), "record")
            found = await many.execute()
        records = [self._readable(decode_handoff, data) for data in found if data is not None]
        return [record for record in records if record is not None and not record.stage.is_terminal]

    # Speaking to Redis

    def _worker_keys(self, worker: str, epoch: str) -> list[str]:
        keys = self.keys
        return [keys.workers, keys.worker(worker), keys.sequence(epoch), keys.inventory(epoch), keys.events]

    def _readable(self, decode: Callable[[Any], _T], data: object) -> _T | None:
        try:
            return decode(data)
        except RemoteProtocolError as error:
            self._num_malformed += 1
            log.warning("skipped a malformed entry of the ledger: %s", error)
            return None

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Any:
        async with self._asking():
            try:
                return await self._redis.evalsha(script.sha, len(keys), *keys, *args)
            except NoScriptError:
                return await self._redis.eval(script.text, len(keys), *keys, *args)

    async def _ask(self, command: Callable[[Redis], Any]) -> Any:
        async with self._asking():
            return await command(self._redis)

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Bounds the time of what is asked inside, and gives all its failures one name."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            said = self._without_credentials(str(error)) or "no answer in time"
            raise LedgerAway(f"{type(error).__name__}: {said}") from error

    def _without_credentials(self, said: str) -> str:
        """Redis names the user whom it forbids something; the words are shown to whoever asks a router."""
        login = self._redis.connection_pool.connection_kwargs
        for secret in (login.get("username"), login.get("password")):
            if secret:
                said = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", said)
        return said


def _client(url: str, timeout_s: float) -> Redis:
    try:
        return Redis.from_url(
            url,
            protocol=2,
            # Each call is bounded as a whole, by _asking(). The library's bound is asyncio.wait_for, which in Python
            # 3.11 swallows a cancellation that comes just as a write is done.
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # who calls decides whether to try again
        )
    except ValueError as error:
        raise SettingsError(f"not a Redis URL (redis://, rediss:// or unix://): {error}") from None


def _refusal_among(error: BaseException | None) -> AuthenticationError | None:
    """The library's later versions wrap it into a ConnectionError."""
    while error is not None and not isinstance(error, AuthenticationError):
        error = error.__cause__
    return error


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _checked_sequence(reply: int) -> int:
    if reply == _OUT_OF_STEP:
        raise OutOfStep
    if reply == _NOT_REGISTERED:
        raise NotRegistered
    return reply
