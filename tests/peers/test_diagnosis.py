"""How peers hid what went wrong, or took work they could not do, replayed: client, log and metrics say it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from engine.core import EngineCore
from proto.control import Attach, Failed, Prefill, RejectReason
from proto.errors import NoWorker, Overloaded, TandemError, UserError, WorkerLost
from proto.handoff import Frame, HandoffMessage
from proto.hashing import BlockHasher
from proto.ids import Epoch, Generation
from proto.lifecycle import Stage
from router.attempt import Rules
from router.flow import Flow
from router.observing import RouterListener
from router.policy import Weights
from router.recovery import Remedy
from service.health import Health
from service.metrics import RouterMetrics
from tests.support.checkpoints import make_checkpoint
from tests.support.fleet import House, read_all, token
from tests.support.paged_engine import FakeMemory, FakeRunner, make_facts
from tests.support.paged_engine import make_request as make_fake
from tests.support.tiers import Pod, make_request, num_finished, prompt_of, send


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("diagnosis"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


class Nobody:
    """Takes stages and hand-off records, and keeps none."""

    def entered(self, *about: object) -> None: ...

    def advance(self, record: object) -> None: ...


class Measured(House):
    """A house with a router's real metrics."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.metrics = RouterMetrics("tiny")
        listener = RouterListener(self.metrics, Nobody(), Nobody())
        self.flow = Flow(
            self.fleet, self.index, self.admission, Rules(), Weights(disagg_threshold=0), listener, self.timers
        )

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


async def test_a_queue_has_an_end_and_beyond_it_is_429_at_the_door() -> None:
    house = House("p1", "d1", max_inflight=2)
    for _ in range(2):
        await house.start()
    house.fleet.sent.clear()
    with pytest.raises(Overloaded) as caught:
        await house.start()
    assert caught.value.status == 429
    assert not house.fleet.sent, "no work was begun"


def test_a_workers_queue_has_an_end_too() -> None:
    facts = make_facts()
    memory = FakeMemory(facts)
    core = EngineCore(FakeRunner(memory, facts), memory, facts, BlockHasher("fake", facts.block_size), max_num_queued=2)
    for name in "ab":
        core.add(make_fake(name, [2, 3, 4]))
    with pytest.raises(Overloaded) as caught:
        core.add(make_fake("c", [2, 3, 4]))
    assert caught.value.retry_after_s


def test_health_is_not_green_while_the_engine_hangs() -> None:
    class Engine:
        last_step_monotonic = 100.0
        is_working = True

    now = 100.0
    health = Health(stall_after_s=5.0, clock=lambda: now)
    health.watch(lambda: Engine())
    health.ready()
    assert health.report().is_ready
    now = 106.0
    assert not health.report().is_ready
    assert "no step" in health.report().detail


async def test_the_time_to_the_first_token_is_not_one_opaque_span() -> None:
    house = Measured("p1", "d1")
    stream = await house.start()
    for stage in (Stage.QUEUED, Stage.PREFILLING, Stage.STREAMING):
        house.timers.advance(0.25)
        house.reports("p1", stream.id, stage)
    house.timers.advance(0.25)
    house.says("p1", token(stream.id, 0))
    house.reports("d1", stream.id, Stage.ADOPTED)
    house.says("d1", token(stream.id, 1, last=True))
    await read_all(stream)
    before_first = (Stage.ROUTED, Stage.QUEUED, Stage.PREFILLING, Stage.STREAMING)
    assert [stream.timings[stage] for stage in before_first] == [0.25] * 4
    for stage in before_first:
        assert house.value("tandem_stage_seconds_sum", stage=stage.value) == 0.25


async def test_a_fallback_is_seen_in_the_log_and_in_the_metrics(caplog: pytest.LogCaptureFixture) -> None:
    """The last prefill worker dies and D computes the prompt: slower, right, and not a secret."""
    house = Measured("p1", "d1")
    with caplog.at_level(logging.INFO):
        stream = await house.start()
        house.kill("p1")
    assert house.last_attach()[1].local
    assert any("prefill" in record.message and "lost" in record.message for record in caplog.records)
    assert all(record.levelno >= logging.INFO for record in caplog.records)
    assert house.value("tandem_recoveries_total", remedy="retry") == 1
    await stream.aclose()


async def test_nothing_is_sent_to_a_worker_that_is_out_of_service() -> None:
    """The breaker was open elsewhere, and was dispatched to all the same."""
    house = House("p1", "p2", "d1", "d2")
    house.fleet.mark_draining(Epoch("epoch-p1"))
    house.fleet.mark_draining(Epoch("epoch-d1"))
    for _ in range(8):
        await house.start()
    assert {name for name, _ in house.fleet.sent} == {"p2", "d2"}
    assert sum(isinstance(message, Attach | Prefill) for _, message in house.fleet.sent) == 16
    house.fleet.mark_draining(Epoch("epoch-d2"))
    house.fleet.sent.clear()
    with suppress(NoWorker):  # or it waits for one to come back
        await house.start()
    assert not house.fleet.sent


@pytest.mark.parametrize("who", ["p1", "d1"])
async def test_a_workers_error_reaches_the_client_in_its_own_words(who: str) -> None:
    house = House("p1", "d1")
    stream = await house.start()
    news = Failed(stream.id, Generation(1), 400, "BadRequestError", "the prompt has 9 tokens too many", "prompt")
    house.flow.message_came(Epoch(f"epoch-{who}"), news)
    with pytest.raises(UserError, match="9 tokens too many") as caught:
        await anext(stream)
    assert caught.value.param == "prompt"
    assert house.flow.num_inflight == 0


@pytest.mark.parametrize("reason", [RejectReason.STALE, RejectReason.UNKNOWN, RejectReason.PEER_LOST])
async def test_what_cannot_be_mended_ends_in_an_error_and_not_in_silence(reason: RejectReason) -> None:
    house = House("p1", "d1", max_attempts=3)
    stream = await house.start()
    for _ in range(20):
        if house.flow.num_inflight:
            house.rejects(house.last_attach()[0], stream.id, reason)
            house.timers.advance(3.0)
    with pytest.raises(TandemError) as caught:
        await anext(stream)
    assert isinstance(caught.value, WorkerLost)
    assert caught.value.stage


async def test_every_recovery_is_heard_of() -> None:
    house = House("p1", "p2", "d1", "d2")
    stream = await house.start()
    house.kill(house.last_prefill()[0])
    house.says(house.last_prefill()[0], token(stream.id, 0))
    house.kill(house.last_attach()[0])
    assert house.heard.remedies == [Remedy.RESTART, Remedy.REDIRECT]
    await stream.aclose()


async def test_a_prompt_travels_as_one_region_per_block(pod: Pod) -> None:
    """Not two per layer and block, which made tens of thousands of small ones of one long prompt."""
    p, d = await pod.prefill(), await pod.decode()
    frames: list[Frame] = []

    def count(message: HandoffMessage) -> Sequence[HandoffMessage]:
        if isinstance(message, Frame):
            frames.append(message)
        return (message,)

    pod.forth = count
    request = make_request(1, prompt_of(400))
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == 1)
    layout = p.host.parts.facts.layout
    assert len(frames) == 400 // layout.block_size
    assert layout.num_layers > 1
    spans = layout.spans()
    assert [span.offset for span in spans] == [sum(each.num_bytes for each in spans[:at]) for at in range(len(spans))]
    assert sum(span.num_bytes for span in spans) == layout.block_bytes
