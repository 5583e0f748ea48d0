"""The fleet: ledger records become links, links become candidates, and a live stream outweighs a missing record."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

import pytest

from kvtransfer.ledger.records import WorkerRecord
from proto.control import (
    Attach,
    FromRouter,
    FromWorker,
    Hello,
    Load,
    LoadReport,
    ModelCard,
    Peer,
    Prefill,
    Progress,
    Role,
    Welcome,
)
from proto.errors import CheckpointError, NoWorker
from proto.hashing import BlockHasher
from proto.health import HealthReport, Phase
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import Request, SamplingParams
from router.policy import Candidate
from router.registry import Registry, deployment_layout
from service.rpc import StreamClosed

REQUEST = Request(id=RequestId("r.1"), prompt=tuple(range(50)), params=SamplingParams(n=2, seed=1))


def record(name: str, *, epoch: str = "", layout: str = "layout-a", started_at: float = 0.0) -> WorkerRecord:
    return WorkerRecord(
        worker=WorkerId(name),
        role=Role.PREFILL if name.startswith("p") else Role.DECODE,
        epoch=Epoch(epoch or f"epoch-{name}"),
        address=f"{epoch or name}:1",
        layout=layout,
        numerics="n",
        model="m",
        model_digest="digest",
        block_size=16,
        num_blocks=100,
        started_at=started_at,
    )


class FakeStream:
    def __init__(self, welcome: Welcome, hung_up: asyncio.Event) -> None:
        self.welcome = welcome
        self._hung_up = hung_up
        self.sent: list[FromRouter] = []
        self._inbox: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self.is_closed = False

    def send(self, message: FromRouter) -> None:
        self.sent.append(message)

    async def receive(self) -> FromWorker:
        message = await self._inbox.get()
        if message is None:
            raise StreamClosed("it died")
        return message

    def say(self, message: FromWorker | None) -> None:
        self._inbox.put_nowait(message)

    async def close(self) -> None:
        self.is_closed = True
        self._hung_up.set()


class FakeClient:
    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address

    async def describe(self) -> ModelCard:
        found = self._network.find(self._address)
        self._network.described.append(found.worker)
        return ModelCard("m", ("m",), "digest", 100, 100, (1,), 16, found.layout, "namespace")

    async def health(self) -> HealthReport:
        report = self._network.health.get(self._network.find(self._address).worker, HealthReport(Phase.READY, True))
        if report is None:
            raise NoWorker("no answer")
        return report

    async def connect(self, hello: Hello) -> FakeStream:
        self._network.num_attempts += 1
        self._network.attempted.set()
        found = self._network.find(self._address)
        assert hello.worker_epoch == found.epoch
        stream = FakeStream(Welcome(found.worker, found.epoch, found.role, 1), self._network.hung_up)
        self._network.streams[found.epoch] = stream
        return stream

    async def close(self) -> None:
        self._network.num_closed += 1


class Network:
    """Who can be reached."""

    def __init__(self) -> None:
        self.hosts: dict[str, WorkerRecord] = {}
        self.streams: dict[Epoch, FakeStream] = {}
        self.described: list[WorkerId] = []
        self.health: dict[str, HealthReport | None] = {}
        self.num_attempts = 0
        self.num_closed = 0
        self.attempted = asyncio.Event()
        self.hung_up = asyncio.Event()

    def host(self, *records: WorkerRecord) -> None:
        self.hosts.update({each.address: each for each in records})

    def find(self, address: str) -> WorkerRecord:
        if address not in self.hosts:
            raise NoWorker(f"nobody at {address}")
        return self.hosts[address]


class Book:
    def __init__(self) -> None:
        self.known: set[str] = set()
        self.served = ""
        self.error: Exception | None = None

    def knows(self, layout: str) -> bool:
        return layout in self.known

    async def learn(self, card: ModelCard) -> None:
        if self.error is not None:
            raise self.error
        self.known.add(card.layout)

    def serve(self, layout: str) -> None:
        self.served = layout

    def hasher(self, layout: str) -> BlockHasher:
        return BlockHasher("namespace", 16)


class Fleet:
    """A registry over a fake network, and what its subscriber hears."""

    def __init__(self) -> None:
        self.network, self.book, self.now = Network(), Book(), 0.0
        self.registry = Registry(
            Epoch("router"),
            lambda address: FakeClient(self.network, address),
            self.book,
            lambda: self.now,
            health_every_s=0.001,
        )
        self.registry.subscribe(self)
        self.heard: list[tuple[str, str]] = []
        self.messages: list[FromWorker] = []
        self._news = asyncio.Event()

    def worker_up(self, epoch: Epoch) -> None:
        self.heard.append(("up", epoch))
        self._news.set()

    def worker_back(self, epoch: Epoch) -> None:
        self.heard.append(("back", epoch))
        self._news.set()

    def worker_down(self, epoch: Epoch) -> None:
        self.heard.append(("down", epoch))
        self._news.set()

    def message_came(self, epoch: Epoch, message: FromWorker) -> None:
        self.messages.append(message)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def hears(self, name: str, load: Load) -> None:
        """The worker's report has come, and a word after it."""
        stream = self.network.streams[Epoch(f"epoch-{name}")]
        stream.say(LoadReport(load))
        stream.say(Progress(RequestId("r"), Generation(1), Stage.QUEUED))
        await self.until(lambda: bool(self.messages))
        self.messages.clear()

    async def until_polled(self, condition: Callable[[], bool]) -> None:
        """For what no event tells of."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def up(self, *records: WorkerRecord) -> None:
        """These are on the ledger and can be reached; waits until they are connected."""
        self.network.host(*records)
        self.registry.records_changed(records)
        await self.until(lambda: {("up", each.epoch) for each in records} <= set(self.heard))

    def one(self, name: str) -> Candidate:
        return next(each for each in self.registry.view().workers if each.worker == name)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.registry.close()


async def test_a_record_becomes_a_usable_worker(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    view = fleet.registry.view()
    assert [(each.worker, each.role, each.is_usable) for each in view.workers] == [
        ("d1", Role.DECODE, True),
        ("p1", Role.PREFILL, True),
    ]
    assert (view.layout, view.block_size) == ("layout-a", 16)
    assert fleet.book.served == "layout-a"


async def test_the_card_is_read_from_one_worker_of_a_layout(fleet: Fleet) -> None:
    await fleet.up(record("p1"))
    await fleet.up(record("p1"), record("p2"), record("d1"))
    assert fleet.network.described == ["p1"]


async def test_messages_go_to_the_flow_and_loads_stay(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    stream = fleet.network.streams[Epoch("epoch-d1")]
    news = Progress(RequestId("r.1"), Generation(1), Stage.DECODING)
    stream.say(LoadReport(Load(num_running=7)))
    stream.say(news)
    await fleet.until(lambda: bool(fleet.messages))
    assert fleet.messages == [news]
    assert fleet.one("d1").load.num_running == 7
    fleet.registry.send(Epoch("epoch-d1"), Attach(REQUEST, Generation(1), False, 30.0))
    assert len(stream.sent) == 1


async def test_a_stream_that_breaks_for_a_moment_comes_back(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    fleet.network.streams[Epoch("epoch-d1")].say(None)
    await fleet.until(lambda: ("back", "epoch-d1") in fleet.heard)
    assert fleet.heard == [("up", "epoch-d1"), ("back", "epoch-d1")]
    assert fleet.one("d1").is_usable


async def test_what_is_sent_while_a_stream_is_broken_is_kept(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    first = fleet.network.streams[Epoch("epoch-d1")]
    first.say(None)
    await fleet.network.hung_up.wait()
    assert not fleet.one("d1").is_usable
    fleet.registry.send(Epoch("epoch-d1"), Attach(REQUEST, Generation(1), False, 30.0))
    await fleet.until(lambda: ("back", "epoch-d1") in fleet.heard)
    second = fleet.network.streams[Epoch("epoch-d1")]
    assert (len(first.sent), len(second.sent)) == (0, 1)


async def test_a_worker_that_does_not_answer_at_once_is_lost(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    del fleet.network.hosts["d1:1"]
    fleet.network.streams[Epoch("epoch-d1")].say(None)
    await fleet.until(lambda: ("down", "epoch-d1") in fleet.heard)
    fleet.network.host(record("d1"))
    await fleet.until(lambda: fleet.heard.count(("up", "epoch-d1")) == 2)
    assert fleet.heard == [("up", "epoch-d1"), ("down", "epoch-d1"), ("up", "epoch-d1")]


async def test_a_worker_that_makes_no_progress_gets_no_work_until_it_does(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    fleet.network.health["d1"] = HealthReport(Phase.READY, False, "no step for 60 s")
    await fleet.until_polled(lambda: not fleet.one("d1").is_usable)
    assert fleet.registry.troubles() == ["d1: no step for 60 s"]
    fleet.network.health["d1"] = HealthReport(Phase.READY, True)
    await fleet.until(lambda: fleet.heard.count(("up", "epoch-d1")) == 2)
    assert fleet.one("d1").is_usable
    assert fleet.registry.troubles() == []


async def test_a_worker_that_answers_no_probe_is_sick_too(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    fleet.network.health["d1"] = None
    await fleet.until_polled(lambda: not fleet.one("d1").is_usable)
    assert "did not answer" in fleet.registry.troubles()[0]


async def test_a_worker_that_says_it_drains_is_left_alone_and_not_sick(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    fleet.network.health["d1"] = HealthReport(Phase.DRAINING, False)
    await fleet.until_polled(lambda: not fleet.one("d1").is_usable)
    assert fleet.registry.troubles() == []


async def test_a_worker_that_fails_too_much_is_distrusted_until_a_probe(fleet: Fleet) -> None:
    await fleet.up(record("d1"), record("d2"))
    fleet.network.health["d1"] = HealthReport(Phase.READY, False, "stalled")
    for _ in range(5):
        fleet.registry.note_fault(Epoch("epoch-d1"))
    fleet.registry.note_success(Epoch("epoch-d2"))
    assert (fleet.one("d1").is_distrusted, fleet.one("d2").is_distrusted) == (True, False)
    fleet.now = 1000.0
    await fleet.until_polled(lambda: not fleet.one("d1").is_usable)
    assert fleet.one("d1").is_distrusted
    fleet.now = 2000.0
    fleet.network.health.clear()
    await fleet.until_polled(lambda: not fleet.one("d1").is_distrusted)
    assert fleet.one("d1").is_usable


async def test_a_new_incarnation_inherits_its_name(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    for _ in range(5):
        fleet.registry.note_fault(Epoch("epoch-d1"))
    await fleet.up(record("d1", epoch="second"))
    assert fleet.one("d1").is_distrusted


async def test_a_missing_record_ejects_nobody_whose_stream_is_alive(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    fleet.registry.records_changed([record("p1")])
    assert fleet.one("d1").is_usable
    del fleet.network.hosts["d1:1"]
    fleet.network.streams[Epoch("epoch-d1")].say(None)
    await fleet.until(lambda: ("down", "epoch-d1") in fleet.heard)
    assert [each.worker for each in fleet.registry.view().workers] == ["p1"]


async def test_a_missing_record_and_no_stream_means_gone(fleet: Fleet) -> None:
    fleet.registry.records_changed([record("d1")])
    await fleet.network.attempted.wait()
    assert not fleet.one("d1").is_usable
    assert fleet.registry.troubles() == ["d1: nobody at d1:1"]
    fleet.registry.records_changed([])
    assert fleet.registry.view().workers == ()


async def test_a_new_epoch_replaces_the_old_one_at_once(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    await fleet.up(record("d1", epoch="second"))
    await fleet.until(lambda: ("down", "epoch-d1") in fleet.heard)
    assert [each.epoch for each in fleet.registry.view().workers] == ["second"]
    fleet.registry.send(Epoch("epoch-d1"), Attach(REQUEST, Generation(1), False, 30.0))  # dropped
    assert fleet.network.streams[Epoch("epoch-d1")].sent == []


async def test_someone_else_at_the_address_is_not_used(fleet: Fleet) -> None:
    fleet.network.hosts["d1:1"] = dataclasses.replace(record("p9"), epoch=Epoch("epoch-d1"))
    fleet.registry.records_changed([record("d1")])
    await fleet.network.attempted.wait()
    await fleet.network.hung_up.wait()
    assert fleet.registry.troubles()[0].startswith("d1: d1:1 says it is prefill worker p9")
    assert not fleet.one("d1").is_usable


async def test_a_worker_whose_card_is_unusable_says_why(fleet: Fleet) -> None:
    fleet.book.error = CheckpointError("no tokenizer")
    fleet.network.host(record("d1"))
    fleet.registry.records_changed([record("d1")])
    await fleet.network.hung_up.wait()
    assert fleet.registry.troubles() == ["d1: no tokenizer"]
    assert not fleet.heard


async def test_a_bug_met_in_a_card_is_said_and_the_worker_asked_again(fleet: Fleet) -> None:
    fleet.book.error = ValueError("a bug")
    fleet.network.host(record("d1"))
    fleet.registry.records_changed([record("d1")])
    await fleet.network.hung_up.wait()
    assert fleet.registry.troubles() == ["d1: what it shows cannot be used: ValueError: a bug"]
    fleet.book.error = None
    await fleet.until(lambda: ("up", "epoch-d1") in fleet.heard)
    assert fleet.registry.troubles() == []


async def test_what_was_sent_counts_until_the_second_report(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    fleet.registry.send(Epoch("epoch-d1"), Attach(REQUEST, Generation(1), False, 30.0))
    fleet.registry.send(Epoch("epoch-p1"), Prefill(REQUEST, Generation(1), Peer(WorkerId("d1"), Epoch("e"), "a"), 30.0))
    decode, prefill = fleet.one("d1"), fleet.one("p1")
    assert (decode.sent_tokens, decode.sent_room_tokens, decode.sent_choices) == (0, 50, 2)
    assert (prefill.sent_tokens, prefill.sent_room_tokens, prefill.sent_choices) == (50, 0, 0)
    fleet.registry.send(Epoch("epoch-d1"), Attach(REQUEST, Generation(1), True, 30.0))
    assert fleet.one("d1").sent_tokens == 50
    for left in (50, 0):
        await fleet.hears("p1", Load())
        assert fleet.one("p1").sent_tokens == left


async def test_full_and_draining_workers(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    fleet.registry.mark_full(Epoch("epoch-p1"), 2.0)
    fleet.registry.mark_draining(Epoch("epoch-d1"))
    assert fleet.one("p1").full_for_s == 2.0
    assert not fleet.one("d1").is_usable
    fleet.now = 5.0
    assert fleet.one("p1").full_for_s == 0.0
    fleet.registry.records_changed([dataclasses.replace(record("p1"), draining=True), record("d1")])
    assert not fleet.one("p1").is_usable


async def test_a_full_worker_is_asked_again_when_fewer_wait(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    for waiting in ([8, 8, 7], [7, 6], [0]):
        fleet.registry.mark_full(Epoch("epoch-p1"), 50.0)
        for number in waiting:
            assert fleet.one("p1").full_for_s == 50.0
            await fleet.hears("p1", Load(num_waiting=number))
        assert fleet.one("p1").full_for_s == 0.0


async def test_workers_that_disagree_are_named_in_the_log(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    await fleet.up(record("p1", started_at=1.0), record("d1", started_at=2.0), record("d2", layout="layout-b"))
    assert fleet.registry.view().layout == "layout-a"
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "workers d2 have another model, dtype or block size than the deployment (layout layout-a) and are not used"
    ]


async def test_a_layout_that_is_replaced_keeps_its_own_workers(fleet: Fleet) -> None:
    await fleet.up(record("d1"))
    other = [dataclasses.replace(record(name, layout="layout-b"), block_size=32) for name in ("p2", "d2")]
    await fleet.up(record("d1"), *other)
    now, then = fleet.registry.view(), fleet.registry.view("layout-a")
    assert (now.layout, now.block_size) == ("layout-b", 32)
    assert (then.layout, then.block_size) == ("layout-a", 16)
    assert [each.worker for each in then.workers] == ["d1"]


async def test_closing_ends_every_link(fleet: Fleet) -> None:
    await fleet.up(record("p1"), record("d1"))
    await fleet.registry.close()
    assert {("down", "epoch-p1"), ("down", "epoch-d1")} <= set(fleet.heard)
    assert fleet.network.num_closed == 2
    assert all(stream.is_closed for stream in fleet.network.streams.values())


A, B = "layout-a", "layout-b"


@pytest.mark.parametrize(
    ("live", "current", "expected"),
    [
        ([], "layout-a", A),
        ([record("d1")], "", A),
        ([record("d1"), record("d2", layout=B), record("p2", layout=B)], A, B),  # only b makes a pair
        ([record("d1"), record("p1"), record("d2", layout=B), record("p2", layout=B)], B, B),  # as it was
        ([record("d1"), record("p1"), record("d2", layout=B), record("p2", layout=B), record("d3")], "", A),
        ([record("p1", started_at=2.0), record("d1", layout=B, started_at=1.0)], "", B),
    ],
)
def test_the_deployments_layout(live: list[WorkerRecord], current: str, expected: str) -> None:
    assert deployment_layout(live, current) == expected
