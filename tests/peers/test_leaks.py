"""How peers lost blocks for good, replayed: afterwards every block is free or cached, without anyone's help."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proto.control import Abort, Attach, Peer, Prefill, Rejected, RejectReason
from proto.handoff import Fence, Grant, Offer, TransportOffer
from proto.ids import Epoch, WorkerId
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import FIRST, LEASE_S, Pod, Side, make_request, num_finished, prompt_of, send, until_idle

SOON_S = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("leaks"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


async def until_freed(side: Side) -> None:
    """Nobody sends anything: what ends must end by the worker's own clock."""
    await side.tier.drained()
    await until_idle(side)


@pytest.mark.parametrize("is_attached", [True, False])
async def test_a_prefill_worker_that_falls_silent_does_not_keep_decode_blocks(pod: Pod, is_attached: bool) -> None:
    """The stream stays open, so nothing is lost, and nothing comes."""
    d = await pod.decode()
    request = make_request(1, prompt_of(100))
    if is_attached:
        d.tier.handle(Attach(request, FIRST, local=False, lease_s=SOON_S))
    layout = d.host.parts.facts.layout
    link = await pod.connect(d.peer)
    offer = Offer(
        fence=Fence(request.id, FIRST, Epoch("silent"), d.peer.epoch),
        layout=layout.fingerprint(),
        layout_text=layout.describe(),
        numerics=d.host.parts.facts.numerics,
        num_tokens=len(request.prompt),
        num_choices=1,
        hashes=tuple(d.host.parts.hasher.all_blocks(request.prompt, "")),
        transports=(TransportOffer("memory"),),
        lease_s=SOON_S,
    )
    await link.send(offer)
    assert isinstance(await link.receive(), Grant)
    assert not await d.is_idle()
    await until_freed(d)
    await link.close()


async def test_a_request_refused_before_admission_is_released_on_prefill(pod: Pod) -> None:
    """D can never take it, and the router says nothing more: P's own lease ends the hold."""
    p, d = await pod.prefill(), await pod.decode()
    d.tier.is_draining = True
    request = make_request(1, prompt_of(60))
    p.tier.handle(Prefill(request, FIRST, d.peer, SOON_S))
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    assert p.router.of(Rejected)[0].held
    await until_freed(p)
    assert await d.is_idle()


async def test_warm_requests_leave_no_pages_behind(pod: Pod) -> None:
    """The same prompt over and over: served from the cache, and not one block more is taken each time."""
    p, d = await pod.prefill(), await pod.decode()
    cached: list[tuple[int, int]] = []
    for number in range(1, 7):
        send(p, d, make_request(number, prompt_of(100)))
        await d.router.until(lambda number=number: num_finished(d) == number)
        await p.tier.drained()
        await until_idle(p)
        await until_idle(d)
        sizes = [len(await side.host.call(lambda core: core.cached_hashes())) for side in (p, d)]
        cached.append((sizes[0], sizes[1]))
    assert len(set(cached[1:])) == 1
    free = [(await side.host.call(lambda core: core.load())).num_free_blocks for side in (p, d)]
    assert free == [64, 64]


async def test_a_hold_that_timed_out_is_cleaned_up_without_new_work(pod: Pod) -> None:
    """No request comes after it, no message, no call: only time passes."""
    p = await pod.prefill()
    nobody = Peer(WorkerId("d9"), Epoch("gone"), "d9")
    request = make_request(1, prompt_of(100))
    p.tier.handle(Prefill(request, FIRST, nobody, SOON_S))
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    assert p.router.of(Rejected)[0].reason is RejectReason.PEER_LOST
    await until_freed(p)


async def test_several_choices_neither_hang_nor_leak(pod: Pod) -> None:
    """Some choices stop early, one request is aborted in the middle, one runs to its end."""
    p, d = await pod.prefill(), await pod.decode()
    whole, cut, stopped = (
        make_request(number, prompt_of(40, seed=number), n=n, max_tokens=40, temperature=1.0)
        for number, n in ((1, 3), (2, 2), (3, 3))
    )
    for request in (whole, cut, stopped):
        send(p, d, request)
    await d.router.until(lambda: {token.request for token in d.router.tokens()} >= {whole.id, cut.id, stopped.id})
    d.tier.handle(Abort(cut.id, FIRST))
    p.tier.handle(Abort(cut.id, FIRST))
    d.tier.handle(Abort(stopped.id, FIRST, (0, 2)))
    await d.router.until(
        lambda: (
            sum(t.finish is not None and t.request == whole.id for t in d.router.tokens()) == 3
            and sum(t.finish is not None and t.request == stopped.id for t in d.router.tokens()) >= 1
        )
    )
    await p.tier.drained()
    await until_freed(d)
    await until_idle(p)


async def test_a_lease_is_what_was_said(pod: Pod) -> None:
    """The counterpart of the others: with a long lease the held blocks are still there."""
    p, d = await pod.prefill(), await pod.decode()
    d.tier.is_draining = True
    request = make_request(1, prompt_of(60))
    p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    await p.router.until(lambda: bool(p.router.of(Rejected)) and bool(p.router.tokens()))
    assert not await p.is_idle()
    p.tier.handle(Abort(request.id, FIRST))
    await until_freed(p)
