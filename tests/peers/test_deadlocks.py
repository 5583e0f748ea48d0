"""How peers' halves came to wait for each other, replayed with pools and budgets so small that everybody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import pytest

from engine.core import EngineCore
from proto.control import Attach, Prefill, Progress, Redirect, Rejected, RejectReason
from proto.handoff import HandoffMessage, Offer
from proto.hashing import BlockHasher
from proto.ids import Generation, RequestId
from proto.lifecycle import Stage
from proto.request import Request
from tests.support.checkpoints import make_checkpoint
from tests.support.paged_engine import FakeMemory, FakeRunner, make_facts
from tests.support.paged_engine import make_request as make_fake
from tests.support.tiers import FIRST, LEASE_S, Pod, Side, alone, make_request, prompt_of, send, until_idle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("deadlocks"), "qwen3")


@pytest.fixture
async def small(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint, num_blocks=33, chunk=16)
    yield pod
    await pod.close()


def tokens_of(request: Request, *sides: Side) -> dict[tuple[int, int], int]:
    return {
        (token.choice, token.position): token.token
        for side in sides
        for token in side.router.tokens()
        if token.request == request.id
    }


async def see_through(p: Side, d: Side, requests: Iterable[Request]) -> None:
    """The router's part: whom D refused is redirected to it, and whom P dropped is sent again, until all are done."""
    generations = {request.id: FIRST for request in requests}
    by_id = {request.id: request for request in requests}
    heard = 0
    while not all(any(t.finish and t.request == name for t in d.router.tokens()) for name in by_id):
        for news in p.router.of(Rejected)[heard:]:
            heard += 1
            if news.generation < generations[news.request]:
                continue
            await asyncio.sleep(0.01)
            generation = generations[news.request] = Generation(news.generation + 1)
            request = by_id[news.request]
            d.tier.handle(Attach(request, generation, local=False, lease_s=LEASE_S))
            if news.held:
                p.tier.handle(Redirect(request.id, generation, d.peer))
            else:
                p.tier.handle(Prefill(request, generation, d.peer, LEASE_S))
        await asyncio.sleep(0.005)


async def test_prefill_decode_and_router_do_not_wait_for_each_other_with_chunked_prefill(small: Pod) -> None:
    """Twice as many prompts as either pool can hold, in chunks of one block, and few may be held."""
    p, d = await small.prefill(max_held=2), await small.decode()
    requests = [make_request(number, prompt_of(150, seed=number), max_tokens=12) for number in range(1, 7)]
    for request in requests:
        send(p, d, request)
    async with asyncio.timeout(60):
        await see_through(p, d, requests)
    for request in requests:
        assert tokens_of(request, p, d) == alone(small, request)
    await p.tier.drained()
    await until_idle(p)
    await until_idle(d)


async def test_prompts_that_wait_at_prefill_hold_nothing_at_decode(small: Pod) -> None:
    """Preallocation hogged memory elsewhere: here D is asked for room only when the first chunk is about to run."""
    p, d = await small.prefill(), await small.decode()
    offered_early: list[RequestId] = []

    def watch(message: HandoffMessage) -> Sequence[HandoffMessage]:
        computed = {each.request for each in p.router.of(Progress) if each.stage is Stage.PREFILLING}
        if isinstance(message, Offer) and message.fence.request not in computed:
            offered_early.append(message.fence.request)
        return (message,)

    small.forth = watch
    requests = [make_request(number, prompt_of(200, seed=number), max_tokens=2) for number in range(1, 4)]
    for request in requests:
        send(p, d, request)
    await p.router.until(lambda: Stage.PREFILLING in p.router.stages())
    used = d.host.parts.facts.num_blocks - (await d.host.call(lambda core: core.load())).num_free_blocks
    assert used <= 14, "room for one prompt of thirteen blocks and its growth, not for three"
    async with asyncio.timeout(60):
        await see_through(p, d, requests)
    assert not offered_early


async def test_what_decode_preempts_it_computes_again_itself_and_goes_on(checkpoint: Path) -> None:
    """Answers outgrow D's pool. The preempted ones are not sent back to P, and do not lock D up."""
    pod = Pod(checkpoint, num_blocks=33, chunk=64)
    p, d = await pod.prefill(), await pod.decode()
    requests = [
        make_request(number, prompt_of(60, seed=number), max_tokens=110, temperature=0.8) for number in range(4)
    ]
    for request in requests:
        send(p, d, request)
    async with asyncio.timeout(100):
        await see_through(p, d, requests)
    assert await d.host.call(lambda core: core.stats.num_preemptions) > 0
    computed_at_p = await p.host.call(lambda core: core.stats.prompt_tokens_computed)
    assert computed_at_p == sum(len(request.prompt) for request in requests), "each prompt was prefilled once"
    for request in requests:
        assert tokens_of(request, p, d) == alone(pod, request)
    await until_idle(d)
    await pod.close()


def test_room_is_not_granted_against_blocks_that_running_answers_need_next() -> None:
    """No admission against growth, elsewhere: granted prompts and growing answers preempted each other for ever."""
    facts = make_facts(num_blocks=8, max_model_len=32)
    memory = FakeMemory(facts)
    hasher = BlockHasher("fake", facts.block_size)
    core = EngineCore(FakeRunner(memory, facts), memory, facts, hasher)
    for name in "ab":
        core.add(
            make_fake(name, [token % 14 + 2 for token in prompt_of(11, ord(name))], max_tokens=16, ignore_eos=True)
        )
    refused = granted = 0
    while core.has_work():
        core.step()
        core.check_integrity()
        waiting = core.load().num_waiting
        prompt = [3] * 5
        room = core.reserve(RequestId("new"), hasher.all_blocks(prompt), len(prompt), 1)
        if waiting:
            assert room is None, "whoever was preempted goes first"
        refused, granted = refused + (room is None), granted + (room is not None)
        core.cancel(RequestId("new"))
    assert core.stats.num_preemptions > 0
    assert refused
    assert granted
    assert core.is_idle()


async def test_a_full_decode_worker_refuses_with_a_hint_instead_of_queueing(small: Pod) -> None:
    p, d = await small.prefill(), await small.decode()
    long = make_request(1, prompt_of(300), max_tokens=150)
    d.tier.handle(Attach(long, FIRST, local=True, lease_s=LEASE_S))
    await d.router.until(lambda: bool(d.router.tokens()))
    send(p, d, make_request(2, prompt_of(250, seed=2)))
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    refused = p.router.of(Rejected)[0]
    assert (refused.reason, refused.held) == (RejectReason.REFUSED, True)
    assert refused.retry_after_s
