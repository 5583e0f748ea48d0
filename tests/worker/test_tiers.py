"""A prefill and a decode tier against each other: real engines, real hand-offs, no processes.

The tokens must be those of one engine that does everything itself, and afterwards every block must be free or cached.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvtransfer.transports.memory import Faults
from proto.control import Abort, Attach, Prefill, Progress, Redirect, Rejected, RejectReason, Tokens
from proto.ids import Generation
from proto.lifecycle import Stage
from proto.request import FinishReason
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import (
    FIRST,
    LEASE_S,
    Pod,
    alone,
    make_request,
    num_finished,
    prompt_of,
    send,
    served,
    until_idle,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiers"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


@pytest.mark.parametrize("length", [1, 16, 17, 200])
async def test_tokens_are_those_of_one_engine(pod: Pod, length: int) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(length), temperature=0.8)
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, request)
    assert p.router.tokens()[0].position == 0, "the first token is the prefill's to say"
    assert p.router.stages()[:2] == [Stage.QUEUED, Stage.PREFILLING]
    assert Stage.ADOPTED in d.router.stages()
    await p.tier.drained()
    assert await p.is_idle()
    assert await d.is_idle()


async def test_several_choices_share_one_prefill_and_one_transfer(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(40), n=3, temperature=1.0)
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == 3)
    assert served(p, d) == alone(pod, request)
    assert len({tuple(served(p, d)[choice, at] for at in range(6)) for choice in range(3)}) > 1
    assert await d.is_idle()


async def test_only_what_the_decode_worker_lacks_travels(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    prompt = prompt_of(100)
    block_bytes = d.host.parts.facts.layout.block_bytes
    for number, text, num_blocks in ((1, prompt, 7), (2, prompt, 1), (3, prompt[:64] + prompt_of(20, 1), 2)):
        d.router.received.clear()
        p.router.received.clear()
        request = make_request(number, text)
        send(p, d, request)
        await d.router.until(lambda: num_finished(d) == 1)
        adopted = next(each for each in d.router.received if getattr(each, "stage", None) is Stage.ADOPTED)
        assert adopted.num_bytes == num_blocks * block_bytes  # type: ignore[union-attr]
        assert served(p, d) == alone(pod, request)


async def test_attach_may_come_after_the_blocks(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(50))
    p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    await d.router.until(lambda: Stage.ADOPTED in d.router.stages())
    assert not d.router.tokens()
    d.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, request)


async def test_a_local_prompt_never_leaves_the_decode_worker(pod: Pod) -> None:
    d = await pod.decode()
    request = make_request(1, prompt_of(70), temperature=0.9)
    d.tier.handle(Attach(request, FIRST, local=True, lease_s=LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(d) == alone(pod, request)
    assert await d.is_idle()


async def test_a_router_that_comes_back_is_told_again(pod: Pod) -> None:
    d = await pod.decode()
    request = make_request(1, prompt_of(20))
    d.tier.handle(Attach(request, FIRST, local=True, lease_s=LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    before = d.router.tokens()
    d.router.received.clear()
    d.tier.handle(Attach(request, FIRST, local=True, lease_s=LEASE_S, positions=(2,)))
    assert d.router.tokens() == before[2:]


async def test_finished_tokens_are_kept_for_one_more_of_the_routers_leases(pod: Pod) -> None:
    d = await pod.decode()
    attach = Attach(make_request(1, prompt_of(20)), FIRST, local=True, lease_s=1.0)
    d.tier.handle(attach)
    await d.router.until(lambda: num_finished(d) == 1)
    await asyncio.sleep(1.2)
    d.tier.handle(attach)
    assert [each.reason for each in d.router.of(Rejected)] == [RejectReason.STALE]


@pytest.mark.parametrize("when", ["at once", "streaming", "decoding"])
async def test_an_abort_frees_both_sides(pod: Pod, when: str) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(300), max_tokens=150)
    send(p, d, request)
    if when == "streaming":
        await p.router.until(lambda: Stage.STREAMING in p.router.stages())
    elif when == "decoding":
        await d.router.until(lambda: len(d.router.tokens()) > 5)
    for side in (p, d):
        side.tier.handle(Abort(request.id, FIRST))
    await p.tier.drained()
    await d.tier.drained()
    await until_idle(p)
    await until_idle(d)


async def test_a_duplicate_of_an_aborted_try_revives_nothing(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(50))
    for side in (p, d):
        side.tier.handle(Abort(request.id, FIRST))
    send(p, d, request)
    reasons = [each.reason for side in (p, d) for each in side.router.of(Rejected)]
    assert RejectReason.STALE in reasons
    assert not p.router.tokens()
    assert await p.is_idle()
    await until_idle(d)


async def test_a_full_decode_worker_refuses_and_a_redirect_needs_no_new_prefill(checkpoint: Path) -> None:
    pod = Pod(checkpoint, num_blocks=34)
    p, full, free = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    long = make_request(1, prompt_of(400), max_tokens=100)
    full.tier.handle(Attach(long, FIRST, local=True, lease_s=LEASE_S))
    await full.router.until(lambda: len(full.router.tokens()) > 0)
    request = make_request(2, prompt_of(200, seed=2))
    send(p, full, request)
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    rejected = p.router.of(Rejected)[0]
    assert rejected.reason is RejectReason.REFUSED
    assert rejected.held
    await p.router.until(lambda: len(p.router.tokens()) == 1)
    num_prefilled = await p.host.call(lambda core: core.stats.prompt_tokens_computed)
    second = Generation(2)
    free.tier.handle(Attach(request, second, local=False, lease_s=LEASE_S))
    p.tier.handle(Redirect(request.id, second, free.peer))
    await free.router.until(lambda: num_finished(free) == 1)
    assert served(p, free) == alone(pod, request)
    assert await p.host.call(lambda core: core.stats.prompt_tokens_computed) == num_prefilled
    full.tier.handle(Abort(long.id, FIRST))
    await pod.close()


async def test_damaged_blocks_are_fetched_again_or_computed_here(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    pod.forth = Faults(random.Random(5), corrupt=0.5)
    for number in range(1, 9):
        p.router.received.clear()
        d.router.received.clear()
        request = make_request(number, prompt_of(80, seed=number), temperature=0.7)
        send(p, d, request)
        await d.router.until(lambda: num_finished(d) == 1)
        assert served(p, d) == alone(pod, request)
        p.tier.handle(Abort(request.id, FIRST))  # where D went on alone, its router lets go of P
    await p.tier.drained()
    await until_idle(p)
    await until_idle(d)


async def test_finished_at_the_first_token_nothing_is_left_behind(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(60), max_tokens=1)
    send(p, d, request)
    await p.router.until(lambda: num_finished(p) == 1)
    assert p.router.tokens()[0].finish is FinishReason.LENGTH
    news = [each for each in p.router.received if isinstance(each, Tokens | Progress)]
    assert isinstance(news[-1], Tokens), "what its router hears afterwards comes too late to be told its client"
    assert [each.stage for each in news[:-1] if isinstance(each, Progress)][-1] is Stage.SEALED
    await p.tier.drained()
    await until_idle(p)
    await until_idle(d)


async def test_a_prompt_that_can_never_fit_fails_with_its_arithmetic(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    send(p, d, make_request(1, prompt_of(600)))
    await p.router.until(lambda: any(type(each).__name__ == "Failed" for each in p.router.received))
    assert await p.is_idle()
