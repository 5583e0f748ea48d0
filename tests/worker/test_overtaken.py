"""Two messages on their way at once: the router's to a prefill worker, and a decode worker's about the same try.

Whichever comes first, blocks that the router still has plans for are there when its word arrives.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.core import EngineCore
from kvtransfer.sender import Sender
from proto.control import Abort, Attach, Prefill, Progress, Redirect, Rejected, RejectReason
from proto.handoff import Adopted, HandoffMessage, Refuse, Stale
from proto.ids import Generation
from proto.lifecycle import Stage
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import (
    FIRST,
    LEASE_S,
    Pod,
    Side,
    alone,
    make_request,
    num_finished,
    prompt_of,
    served,
    until_idle,
)

SECOND = Generation(2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("overtaken"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


def rejections(side: Side) -> list[tuple[RejectReason, bool]]:
    return [(each.reason, each.held) for each in side.router.of(Rejected)]


@pytest.mark.parametrize("when", ["before the offer", "streaming"])
async def test_an_abort_at_the_decode_worker_does_not_overtake_a_redirect(pod: Pod, when: str) -> None:
    """The router gives a decode worker up; what that says to the prefill worker is there before the redirect."""
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(300), temperature=0.8)
    if when == "before the offer":
        first.tier.handle(Abort(request.id, FIRST))
        p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
    else:
        first.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
        p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
        await p.router.until(lambda: Stage.STREAMING in p.router.stages())
        first.tier.handle(Abort(request.id, FIRST))
    await p.router.until(lambda: bool(rejections(p)))
    assert rejections(p) == [(RejectReason.STALE, True)], "its router, should it not know, hears that they are held"
    await p.router.until(lambda: Stage.SEALED in p.router.stages())
    second.tier.handle(Attach(request, SECOND, local=False, lease_s=LEASE_S))
    p.tier.handle(Redirect(request.id, SECOND, second.peer))
    await second.router.until(lambda: num_finished(second) == 1)
    assert served(p, second) == alone(pod, request)
    assert await p.host.call(lambda core: core.stats.prompt_tokens_computed) == 300
    assert await second.host.call(lambda core: core.stats.prompt_tokens_computed) == 0
    for side in (p, first, second):
        await side.tier.drained()
        await until_idle(side)


def right_behind(monkeypatch: pytest.MonkeyPatch, kind: type[HandoffMessage], p: Side, redirect: Redirect) -> None:
    """The redirect is handled in the same turn of the event loop as a decode worker's message, just after it."""
    receive, due = Sender.receive, [redirect]

    def receive_both(self: Sender, message: HandoffMessage, now: float) -> Stale | None:
        answer = receive(self, message, now)
        if isinstance(message, kind) and due:
            p.tier.handle(due.pop())
        return answer

    monkeypatch.setattr(Sender, "receive", receive_both)


async def test_a_refusal_that_a_redirect_overtakes_is_not_told_of_the_redirected_try(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    first.tier.is_draining = True
    request = make_request(1, prompt_of(60))
    second.tier.handle(Attach(request, SECOND, local=False, lease_s=LEASE_S))
    right_behind(monkeypatch, Refuse, p, Redirect(request.id, SECOND, second.peer))
    p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
    await second.router.until(lambda: num_finished(second) == 1)
    assert served(p, second) == alone(pod, request)
    assert not rejections(p)
    await p.tier.drained()
    await until_idle(p)


async def test_a_redirect_of_blocks_that_have_just_been_adopted_is_answered(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(60))
    second.tier.handle(Attach(request, SECOND, local=False, lease_s=LEASE_S))
    right_behind(monkeypatch, Adopted, p, Redirect(request.id, SECOND, second.peer))
    p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
    await p.router.until(lambda: bool(rejections(p)))
    assert [(each.generation, each.reason) for each in p.router.of(Rejected)] == [(SECOND, RejectReason.UNKNOWN)]
    assert (Stage.ADOPTED, SECOND) not in [(each.stage, each.generation) for each in p.router.of(Progress)]
    await p.tier.drained()
    await until_idle(p)
    for side in (first, second):
        side.tier.handle(Abort(request.id, SECOND))
        await until_idle(side)


async def test_a_full_queue_that_a_redirect_overtakes_is_told_of_the_redirected_try(pod: Pod) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    is_busy, may_go_on = threading.Event(), threading.Event()

    def hold_up(core: EngineCore) -> None:
        core._max_num_queued = 0
        is_busy.set()
        may_go_on.wait()

    p.host.tell(hold_up)  # as a long step does
    await asyncio.to_thread(is_busy.wait)
    request = make_request(1, prompt_of(60))
    p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
    await asyncio.sleep(0)
    p.tier.handle(Redirect(request.id, SECOND, second.peer))
    may_go_on.set()
    await p.tier.drained()
    assert [(each.generation, each.reason) for each in p.router.of(Rejected)] == [(SECOND, RejectReason.FULL)]


async def test_what_arrived_whole_and_is_not_wanted_stays_cached(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(100))
    p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    await d.router.until(lambda: Stage.ADOPTED in d.router.stages())
    d.tier.handle(Abort(request.id, FIRST))
    await until_idle(d)
    again = make_request(2, prompt_of(100))
    d.tier.handle(Attach(again, FIRST, local=True, lease_s=LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    assert await d.host.call(lambda core: core.stats.prompt_tokens_computed) == 100 - 6 * 16
    assert served(d) == alone(pod, again)
