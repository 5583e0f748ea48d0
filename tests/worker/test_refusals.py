"""What a worker refused or found damaged can be read on its /metrics, by reason."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.transport import Link, LinkLost
from proto.control import Abort, Attach, Prefill, Redirect, Rejected
from proto.handoff import Fence, Frame, Grant, HandoffMessage, Located, Offer, Stale
from proto.ids import Epoch, Generation
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import FIRST, LEASE_S, Pod, Side, alone, make_request, num_finished, prompt_of, send, served

SECOND = Generation(2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("refusals"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


def refused(reason: str, count: int) -> str:
    return f'tandem_refused_messages_total{{reason="{reason}"}} {count}.0'


def num_refused(side: Side) -> float:
    lines = (line for line in side.page() if line.startswith("tandem_refused_messages_total"))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Tap:
    """Hears what a prefill worker says, and may meddle with it."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.frames: list[Frame] = []

    def __call__(self, message: HandoffMessage) -> Sequence[HandoffMessage]:
        if isinstance(message, Offer):
            self.offers.append(message)
        if not isinstance(message, Frame):
            return (message,)
        self.frames.append(message)
        return self.meddle(message)

    def meddle(self, frame: Frame) -> Sequence[HandoffMessage]:
        return (frame,)


class Spoiled(Tap):
    """Block 1 comes damaged, always."""

    def meddle(self, frame: Frame) -> Sequence[HandoffMessage]:
        assert not isinstance(frame.payload, Located)
        payload = bytearray(frame.payload)
        payload[7] ^= frame.index == 1
        return (replace(frame, payload=bytes(payload)),)


class Twice(Tap):
    def meddle(self, frame: Frame) -> Sequence[HandoffMessage]:
        return (frame, frame)


async def stranger(pod: Pod, d: Side, offer: Offer, **fence: object) -> tuple[Link, Fence]:
    """A prefill worker of the test's own, which has offered."""
    mine = replace(offer.fence, prefill_epoch=Epoch("p9-epoch"), **fence)
    link = await pod.connect(d.peer)
    await link.send(replace(offer, fence=mine))
    return link, mine


async def test_nothing_is_refused_where_all_goes_well_and_every_reason_is_there_to_be_read(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(80))
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == 1)
    await p.tier.drained()
    for side in (p, d):
        assert "tandem_damaged_blocks_total 0.0" in side.page()
        reasons = set(re.findall(r'tandem_refused_messages_total\{reason="(\w+)"\}', "\n".join(side.page())))
        assert reasons == {"stale_generation", "foreign_epoch", "unknown", "late", "duplicate", "malformed"}
        assert num_refused(side) == 0


async def test_a_block_damaged_until_the_decode_worker_gave_up_and_then_replayed(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    tap = pod.forth = Spoiled()
    request = make_request(1, prompt_of(80))
    send(p, d, request)
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, request)
    assert "tandem_damaged_blocks_total 3.0" in d.page(), "asked for twice more, and then given up"
    assert "tandem_damaged_blocks_total 2.0" in p.page()
    link = await pod.connect(d.peer)
    for replayed in (tap.offers[0], tap.frames[0]):
        await link.send(replayed)
        assert await link.receive() == Stale(replayed.fence, FIRST)
    await link.close()
    assert refused("stale_generation", 2) in d.page()
    p.tier.handle(Abort(request.id, FIRST))
    await p.tier.drained()


async def test_blocks_that_come_twice(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    tap = pod.forth = Twice()
    send(p, d, make_request(1, prompt_of(80)))
    await d.router.until(lambda: num_finished(d) == 1)
    assert refused("duplicate", len(tap.frames)) in d.page()
    assert num_refused(d) == len(tap.frames) == 5


async def test_a_late_write_and_blocks_for_another_incarnation(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    tap = pod.forth = Tap()
    request = make_request(1, prompt_of(80))
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == 1)
    await p.tier.drained()
    link, fence = await stranger(pod, d, tap.offers[0], generation=SECOND)
    assert isinstance(await link.receive(), Grant)
    d.tier.handle(Abort(request.id, SECOND))
    await link.send(replace(tap.frames[0], fence=fence))
    assert [await link.receive() for _ in range(2)] == [Stale(fence, SECOND)] * 2
    assert refused("late", 1) in d.page()
    link, fence = await stranger(pod, d, tap.offers[0], generation=Generation(3), decode_epoch=Epoch("d before"))
    assert await link.receive() == Stale(fence, SECOND)
    await link.close()
    assert refused("foreign_epoch", 1) in d.page()
    assert num_refused(d) == 2


async def test_what_breaks_the_contract_of_a_hand_off(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    tap = pod.forth = Tap()
    send(p, d, make_request(1, prompt_of(80)))
    await d.router.until(lambda: num_finished(d) == 1)
    link, _ = await stranger(pod, d, tap.offers[0], request="p9.1")
    grant = await link.receive()
    assert isinstance(grant, Grant)
    await link.send(grant)  # which is not for a prefill worker to say
    with contextlib.suppress(LinkLost):
        while True:
            await link.receive()
    assert refused("malformed", 1) in d.page()


async def test_words_of_routers_that_are_not_applied(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request, other = make_request(1, prompt_of(80)), make_request(2, prompt_of(80))
    prefill, attach = Prefill(request, SECOND, d.peer, LEASE_S), Attach(request, SECOND, local=False, lease_s=LEASE_S)
    d.tier.handle(attach)
    p.tier.handle(prefill)
    p.tier.handle(prefill)
    p.tier.handle(Redirect(request.id, FIRST, d.peer))
    p.tier.handle(Redirect(other.id, SECOND, d.peer))
    p.tier.handle(attach)
    assert {refused("stale_generation", 2), refused("unknown", 1), refused("malformed", 1)} <= set(p.page())
    d.tier.handle(replace(attach, generation=FIRST))
    d.tier.handle(prefill)
    assert {refused("stale_generation", 1), refused("malformed", 1)} <= set(d.page())
    d.tier.handle(Abort(other.id, FIRST))
    d.tier.handle(Attach(other, FIRST, local=True, lease_s=LEASE_S))
    assert refused("stale_generation", 2) in d.page()
    await d.router.until(lambda: num_finished(d) == 1)
    await asyncio.gather(p.tier.drained(), d.tier.drained())
    assert (num_refused(p), num_refused(d)) == (4, 3)
