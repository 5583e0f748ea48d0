"""The fleet: who is on the ledger, who answers, and how busy each is.

    ledger's records ──▶ one link per incarnation ──▶ Candidate of the policy's view
                         stream alive: usable, whatever the ledger says
                         record gone and stream dead: forgotten

A worker's name under a new epoch is a new worker; the old incarnation is dropped at once. When Redis is away, the last
known members and the live streams go on. Knows workers; knows no requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from kvtransfer.ledger.records import WorkerRecord
from proto.control import FromRouter, FromWorker, Hello, LoadReport, ModelCard, Role, Welcome
from proto.errors import LayoutMismatch, RemoteProtocolError
from proto.hashing import BlockHasher
from proto.health import HealthReport
from proto.ids import Epoch, WorkerId
from proto.layout import WIRE_VERSION
from router.links import HEALTH_EVERY_S, ClientLike
from router.member import Member
from router.policy import View
from router.trust import Trust

log = logging.getLogger(__name__)


class FleetEvents(Protocol):
    """Who hears of the workers (``flow``)."""

    def worker_up(self, epoch: Epoch) -> None: ...

    def worker_back(self, epoch: Epoch) -> None:
        """Its stream broke and came back: messages may be missing."""

    def worker_down(self, epoch: Epoch) -> None: ...

    def message_came(self, epoch: Epoch, message: FromWorker) -> None: ...


class ModelBook(Protocol):
    """Where cards go (``models``)."""

    def knows(self, layout: str) -> bool: ...

    async def learn(self, card: ModelCard) -> None: ...

    def serve(self, layout: str) -> None: ...

    def hasher(self, layout: str) -> BlockHasher: ...


class Registry:
    """Feed it ``records_changed``; it keeps a link to everyone. All calls from one event loop."""

    def __init__(
        self,
        router_epoch: Epoch,
        connect: Callable[[str], ClientLike],
        models: ModelBook,
        clock: Callable[[], float],
        health_every_s: float = HEALTH_EVERY_S,
    ) -> None:
        self._router_epoch = router_epoch
        self._connect = connect
        self._models = models
        self._clock = clock
        self._health_every_s = health_every_s
        self._members: dict[Epoch, Member] = {}
        self._trust: dict[WorkerId, Trust] = {}  # a worker that is started again is not trusted more for it
        self._events: FleetEvents | None = None
        self._layout = ""
        self._disagreeing: frozenset[str] = frozenset()
        self._closing: set[asyncio.Task[None]] = set()

    def subscribe(self, events: FleetEvents) -> None:
        """Before the first record. One subscriber."""
        assert self._events is None
        self._events = events

    @property
    def layout(self) -> str:
        """The deployment's KV layout; empty before the first worker came up."""
        return self._layout

    def hasher(self, layout: str) -> BlockHasher:
        return self._models.hasher(layout)

    def view(self, layout: str = "") -> View:
        """For requests of ``layout``; empty: the deployment's. One that is the deployment's no more has its own workers
        and no others: what began there can end there."""
        now, layout = self._clock(), layout or self._layout
        members = sorted(self._members.values(), key=lambda member: member.record.worker)
        own = [member for member in members if member.record.layout == layout]
        workers = tuple(member.candidate(now) for member in (members if layout == self._layout else own))
        return View(workers=workers, layout=layout, block_size=own[0].record.block_size if own else 1)

    def troubles(self) -> list[str]:
        """One line per worker that should be there and gets no work."""
        return [f"{m.record.worker}: {m.trouble}" for m in self._members.values() if m.trouble]

    # From the ledger.

    def records_changed(self, records: Iterable[WorkerRecord]) -> None:
        """All workers on the ledger now. One that is missing here and whose stream is alive stays."""
        present = {record.epoch: record for record in records}
        names = {record.worker: record.epoch for record in present.values()}
        for epoch, member in list(self._members.items()):
            member.is_recorded = epoch in present
            replaced = names.get(member.record.worker, epoch) != epoch
            if replaced or not (member.is_recorded or member.link.is_up):
                self._drop(member, "replaced by a new incarnation" if replaced else "gone from the ledger")
        for epoch, record in present.items():
            known = self._members.get(epoch)
            if known is None:
                self._add(record)
            else:
                self._update(known, record)
        present_names = {member.record.worker for member in self._members.values()}
        for name in [name for name, trust in self._trust.items() if name not in present_names and trust.is_untouched]:
            del self._trust[name]

    def _add(self, record: WorkerRecord) -> None:
        hello = Hello(self._router_epoch, record.epoch, WIRE_VERSION)
        trust = self._trust.setdefault(record.worker, Trust(self._clock))
        member = Member(self, record, self._connect(record.address), hello, trust, self._health_every_s)
        self._members[record.epoch] = member
        log.info("%s worker %s at %s (epoch %s)", record.role.value, record.worker, record.address, record.epoch)
        member.link.start(f"link to {record.worker}")

    def _update(self, member: Member, record: WorkerRecord) -> None:
        was, member.record = member.record, record
        if not member.link.is_up:
            member.load = record.load  # a live stream's reports are newer
            if was.load != record.load:
                member.link.nudge()
        self._agree()

    def _drop(self, member: Member, why: str) -> None:
        log.info("worker %s (epoch %s): %s", member.record.worker, member.record.epoch, why)
        self._members.pop(member.record.epoch, None)
        self._in_background(member.link.close())
        self._agree()

    # From the links.

    async def greeted(self, member: Member, client: ClientLike, welcome: Welcome) -> None:
        """Before a worker is used its model is known. Raises TandemError when it is not who the ledger says."""
        record = member.record
        if (welcome.worker, welcome.role) != (record.worker, record.role):
            raise RemoteProtocolError(
                f"{record.address} says it is {welcome.role.value} worker {welcome.worker}, "
                f"the ledger says {record.role.value} worker {record.worker}"
            )
        if self._models.knows(record.layout):
            return
        card = await client.describe()
        if card.layout != record.layout:
            raise LayoutMismatch(f"{record.worker} shows layout {card.layout}, the ledger says {record.layout}")
        await self._models.learn(card)

    def member_up(self, member: Member) -> None:
        member.reset()
        self._agree()
        log.info("connected to %s worker %s", member.record.role.value, member.record.worker)
        if self._events is not None:
            self._events.worker_up(member.record.epoch)

    def member_back(self, member: Member) -> None:
        log.warning("the stream to %s worker %s broke and is back", member.record.role.value, member.record.worker)
        member.reset()
        self._agree()
        if self._events is not None:
            self._events.worker_back(member.record.epoch)

    def member_probed(self, member: Member, report: HealthReport | None) -> None:
        was = member.sickness
        member.judge(report)
        name = member.record.worker
        if member.sickness != was:
            log.warning("worker %s: %s", name, member.sickness or "is well again")
        is_back = member.trust.probed(is_well=report is not None and not member.sickness)
        if is_back:
            log.warning("worker %s is given work again", name)
        if self._events is not None and (is_back or (was and not member.sickness)):
            self._events.worker_up(member.record.epoch)

    def member_down(self, member: Member, reason: str) -> None:
        is_known = self._members.get(member.record.epoch) is member
        level = logging.WARNING if is_known else logging.INFO  # it was let go before
        log.log(level, "lost %s worker %s: %s", member.record.role.value, member.record.worker, reason)
        if is_known and not (member.is_draining or member.record.draining):
            self.note_fault(member.record.epoch)
        if self._events is not None:
            self._events.worker_down(member.record.epoch)
        if is_known and not member.is_recorded:
            self._drop(member, "its stream ended and it is gone from the ledger")

    def member_said(self, member: Member, message: FromWorker) -> None:
        if isinstance(message, LoadReport):
            member.reported(message.load)
        elif self._events is not None:
            self._events.message_came(member.record.epoch, message)

    # From the flow.

    def send(self, epoch: Epoch, message: FromRouter) -> None:
        """Never blocks; dropped when the worker is gone."""
        if member := self._members.get(epoch):
            member.recent.add(message)
            member.link.send(message)

    def mark_full(self, epoch: Epoch, seconds: float) -> None:
        """It refused work: leave it alone for ``seconds``, or until it reports that fewer wait."""
        if member := self._members.get(epoch):
            member.mark_full(self._clock() + seconds)

    def mark_draining(self, epoch: Epoch) -> None:
        """It takes nothing new, until its stream comes up again."""
        if member := self._members.get(epoch):
            member.is_draining = True

    def note_fault(self, epoch: Epoch) -> None:
        """A request's try failed there, or its process is gone."""
        if (member := self._members.get(epoch)) and member.trust.failed():
            log.warning("worker %s failed too many requests and is left alone for a while", member.record.worker)

    def note_success(self, epoch: Epoch) -> None:
        if member := self._members.get(epoch):
            member.trust.served()

    async def close(self) -> None:
        """Closes every link. May be called twice."""
        for member in list(self._members.values()):
            self._in_background(member.link.close())
        self._members.clear()
        while self._closing:
            await asyncio.wait(self._closing)

    def _agree(self) -> None:
        """Settles the deployment's layout, and says once who differs."""
        live = [m.record for m in self._members.values() if m.link.is_up]
        self._layout = deployment_layout(live, self._layout)
        self._models.serve(self._layout)
        disagreeing = frozenset(record.worker for record in live if record.layout != self._layout)
        if disagreeing - self._disagreeing:
            log.error(
                "workers %s have another model, dtype or block size than the deployment (layout %s) and are not used",
                ", ".join(sorted(disagreeing)),
                self._layout,
            )
        self._disagreeing = disagreeing

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def deployment_layout(live: list[WorkerRecord], current: str) -> str:
    """The layout that is served: one with both roles live goes first, then the current one, then the one that most
    workers have, then that of the worker that started first."""
    if not live:
        return current
    roles: dict[str, set[Role]] = {}
    for record in live:
        roles.setdefault(record.layout, set()).add(record.role)
    sizes = Counter(record.layout for record in live)
    first = {record.layout: record.started_at for record in sorted(live, key=lambda each: -each.started_at)}
    return max(roles, key=lambda each: (len(roles[each]), each == current, sizes[each], -first[each]))
