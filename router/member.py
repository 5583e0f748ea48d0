"""One incarnation of a worker as the fleet knows it: its record, its link, its load, and how it is.

Knows one worker; what follows for the fleet is the registry's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer.ledger.records import WorkerRecord
from proto.control import Attach, FromRouter, FromWorker, Hello, Load, Prefill, Welcome
from proto.health import HealthReport, Phase
from router.links import ClientLike, WorkerLink
from router.policy import Candidate
from router.trust import Trust

MISSED_PROBES = 2
"""Unanswered probes after which a worker is sick, though its stream is there."""


@dataclass(slots=True)
class Sent:
    """What was sent to a worker and its load reports do not show yet."""

    tokens: int = 0
    room_tokens: int = 0
    choices: int = 0


@dataclass(slots=True)
class Recent:
    """Two buckets: a report may have been written just before our message came, the one after it was not."""

    older: Sent = field(default_factory=Sent)
    newer: Sent = field(default_factory=Sent)

    def reported(self) -> None:
        self.older, self.newer = self.newer, Sent()

    def add(self, message: FromRouter) -> None:
        match message:
            case Prefill(request):
                self.newer.tokens += len(request.prefix)
            case Attach(request, _, local):
                self.newer.choices += request.params.n
                self.newer.room_tokens += len(request.prefix)
                self.newer.tokens += len(request.prefix) if local else 0
            case _:
                pass

    @property
    def total(self) -> Sent:
        older, newer = self.older, self.newer
        return Sent(older.tokens + newer.tokens, older.room_tokens + newer.room_tokens, older.choices + newer.choices)


class MemberEvents(Protocol):
    """The registry."""

    async def greeted(self, member: Member, client: ClientLike, welcome: Welcome) -> None: ...

    def member_up(self, member: Member) -> None: ...

    def member_back(self, member: Member) -> None: ...

    def member_said(self, member: Member, message: FromWorker) -> None: ...

    def member_probed(self, member: Member, report: HealthReport | None) -> None: ...

    def member_down(self, member: Member, reason: str) -> None: ...


class Member:
    """One incarnation of a worker, and the far end of its link's events."""

    def __init__(
        self,
        events: MemberEvents,
        record: WorkerRecord,
        client: ClientLike,
        hello: Hello,
        trust: Trust,
        health_every_s: float,
    ) -> None:
        self.record = record
        self.is_recorded = True
        self.is_draining = False
        self.full_until = 0.0
        self._waiting_when_full: int | None = None
        self.load = record.load
        self.recent = Recent()
        self.trust = trust
        self.sickness = ""
        """Why it gets no work though its stream is there; empty: it is well."""
        self.link = WorkerLink(client, hello, self, health_every_s=health_every_s)
        self._events = events
        self._num_unanswered = 0

    async def greeted(self, client: ClientLike, welcome: Welcome) -> None:
        await self._events.greeted(self, client, welcome)

    def up(self) -> None:
        self._events.member_up(self)

    def back(self) -> None:
        self._events.member_back(self)

    def received(self, message: FromWorker) -> None:
        self._events.member_said(self, message)

    def probed(self, report: HealthReport | None) -> None:
        self._events.member_probed(self, report)

    def down(self, reason: str) -> None:
        self._events.member_down(self, reason)

    def mark_full(self, until: float) -> None:
        """It refused work: it is left alone until then, or until it reports that fewer wait."""
        self.full_until = until
        self._waiting_when_full = None

    def reported(self, load: Load) -> None:
        """Reports and refusals come in order, so the first report after a refusal is of a queue that was full."""
        self.load = load
        self.recent.reported()
        at_first = self._waiting_when_full
        if load.num_waiting == 0 or (at_first is not None and load.num_waiting < at_first):
            self.full_until = 0.0
        elif at_first is None:
            self._waiting_when_full = load.num_waiting

    def reset(self) -> None:
        """Its stream is new."""
        self.is_draining = False
        self.mark_full(0.0)
        self.recent = Recent()
        self.sickness = ""
        self._num_unanswered = 0

    def judge(self, report: HealthReport | None) -> None:
        """Sets ``sickness`` by what a probe found; None: it did not answer in time."""
        self._num_unanswered = 0 if report is not None else self._num_unanswered + 1
        if report is None:
            if self._num_unanswered >= MISSED_PROBES:
                self.sickness = f"did not answer {self._num_unanswered} probes"
        elif report.phase is Phase.DRAINING:
            self.is_draining = True
        else:
            self.sickness = "" if report.is_ready else report.detail or f"is {report.phase.value}"

    @property
    def trouble(self) -> str:
        """What is wrong with it; empty: nothing."""
        if not self.link.is_up:
            return self.link.trouble
        return self.sickness or ("failed too many requests lately" if self.trust.is_out else "")

    def candidate(self, now: float) -> Candidate:
        sent = self.recent.total
        record = self.record
        return Candidate(
            worker=record.worker,
            epoch=record.epoch,
            role=record.role,
            address=record.address,
            layout=record.layout,
            numerics=record.numerics,
            is_usable=self.link.is_up and not (self.is_draining or record.draining or self.sickness),
            is_distrusted=self.trust.is_out,
            full_for_s=max(0.0, self.full_until - now),
            load=self.load,
            sent_tokens=sent.tokens,
            sent_room_tokens=sent.room_tokens,
            sent_choices=sent.choices,
            ignores_priority=record.scheduling_policy == "fcfs",
        )
