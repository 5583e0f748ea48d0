"""What goes wrong at a worker's own desk: lost leases, late and repeated messages, an engine that dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core import EngineCore
from engine.output import StepOutput
from kvtransfer.send_session import SendSession
from proto.control import Abort, Attach, Failed, Prefill, Redirect, Rejected, RejectReason
from proto.errors import DeviceLost, NotFinite, SettingsError
from proto.handoff import Frame, HandoffMessage, Seal
from proto.ids import Generation
from proto.lifecycle import Stage
from proto.request import FinishReason, SamplingParams
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
    send,
    served,
    until_idle,
)
from worker.leases import Leases

SECOND = Generation(2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


def reasons(side: Side) -> list[RejectReason]:
    return [each.reason for each in side.router.of(Rejected)]


async def test_a_prefill_worker_whose_blocks_cannot_leave_does_not_start(pod: Pod) -> None:
    with pytest.raises(SettingsError, match=r"No allowed transport works here \(nccl: .*not a GPU's"):
        await pod.prefill(transport="nccl")


async def test_a_prefill_worker_whose_device_is_lost_in_a_hand_over_ends(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(self: SendSession) -> None:
        raise DeviceLost("the GPU answers no more")

    monkeypatch.setattr(SendSession, "run", lose)
    p, d = await pod.prefill(), await pod.decode()
    condemned: list[BaseException] = []
    monkeypatch.setattr(p.host, "condemn", condemned.append)
    p.tier.handle(Prefill(make_request(1, prompt_of(40)), FIRST, d.peer, LEASE_S))
    await p.router.until(lambda: bool(condemned))
    assert isinstance(condemned[0], DeviceLost)
    p.tier.crashed(condemned[0])
    assert reasons(p) == [RejectReason.UNKNOWN]


async def test_an_engine_that_dies_sends_its_requests_elsewhere(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(300), max_tokens=150)

    def explode(core: EngineCore) -> None:
        def step() -> StepOutput:
            raise MemoryError("no memory left")

        core.step = step  # type: ignore[method-assign]

    for side in (p, d):
        await side.host.call(explode)
    p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    d.tier.handle(Attach(make_request(2, prompt_of(20)), FIRST, local=True, lease_s=LEASE_S))
    for side in (p, d):
        await side.router.until(lambda side=side: RejectReason.UNKNOWN in reasons(side))
        await side.tier.drained()
    # What comes before the process has ended is turned away too, and nothing waits for it.
    p.tier.handle(Prefill(make_request(3, prompt_of(20)), FIRST, d.peer, LEASE_S))
    d.tier.handle(Attach(make_request(4, prompt_of(20)), FIRST, local=True, lease_s=LEASE_S))
    for side in (p, d):
        await side.router.until(lambda side=side: len(reasons(side)) == 2)
        assert not side.router.of(Failed), "an engine's death is no answer to a request"
        await side.tier.drained()


async def test_a_prompt_without_finite_numbers_fails_and_the_engine_goes_on(tmp_path: Path) -> None:
    poison = 310
    pod = Pod(make_checkpoint(tmp_path, "qwen3", poison=poison))
    p, d = await pod.prefill(), await pod.decode()
    common = prompt_of(48)
    bad = (*common, poison, *prompt_of(150, 1))
    send(p, d, make_request(1, bad))
    await p.router.until(lambda: bool(p.router.of(Failed)))
    d.tier.handle(Attach(make_request(2, bad), FIRST, local=True, lease_s=LEASE_S))
    await d.router.until(lambda: bool(d.router.of(Failed)))
    for side in (p, d):
        assert [(each.status, each.kind) for each in side.router.of(Failed)] == [(500, NotFinite.kind)]
        side.tier.handle(Abort(make_request(1, bad).id, FIRST))
        await side.tier.drained()
        await until_idle(side)
        assert await side.host.call(lambda core: core.stats.num_failed) == 1
        assert await side.host.call(lambda core: core.cached_hashes()) == [], "nobody is to match any of it"
    sound = make_request(3, (*common, *prompt_of(150, 2)), temperature=0.0)
    send(p, d, sound)
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, sound)
    await pod.close()


async def test_a_prefill_worker_that_cannot_send_says_that_it_is_not_the_decode_workers_fault(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()

    def no_memory(message: HandoffMessage) -> list[HandoffMessage]:
        if isinstance(message, Frame):
            raise MemoryError
        return [message]

    pod.forth = no_memory
    send(p, d, make_request(1, prompt_of(200)))
    await p.router.until(lambda: RejectReason.UNKNOWN in reasons(p))
    assert RejectReason.PEER_LOST not in reasons(p), "another decode worker would not help"
    for side in (p, d):
        await side.tier.drained()
        await until_idle(side)


@pytest.mark.parametrize("local", [True, False])
async def test_an_attach_to_a_try_that_is_over_revives_nothing(pod: Pod, local: bool) -> None:
    d = await pod.decode()
    request = make_request(1, prompt_of(40))
    d.tier.handle(Abort(request.id, FIRST))
    d.tier.handle(Attach(request, FIRST, local=local, lease_s=LEASE_S))
    assert reasons(d) == [RejectReason.STALE]
    await d.tier.drained()
    assert await d.is_idle()


async def test_an_attach_after_its_prefill_worker_has_withdrawn_is_told_so(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request, is_sending = make_request(1, prompt_of(200)), asyncio.Event()

    def without_seal(message: HandoffMessage) -> list[HandoffMessage]:
        if isinstance(message, Frame):  # so D has reserved, and waits for the rest
            is_sending.set()
        return [] if isinstance(message, Seal) else [message]

    pod.forth = without_seal
    p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    await is_sending.wait()
    p.tier.handle(Abort(request.id, FIRST))
    await until_idle(p)
    await until_idle(d)
    await d.tier.drained()
    d.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
    assert reasons(d) == [RejectReason.STALE], "it would wait for blocks that never come"


async def test_the_end_of_a_lease_is_told_to_a_router_that_is_still_there(pod: Pod) -> None:
    p, d = await pod.prefill(), await pod.decode()
    d.tier.is_draining = True  # refuses, so that the blocks are held
    request = make_request(1, prompt_of(40))
    p.tier.handle(Prefill(request, FIRST, d.peer, 0.3))
    assert not pod.orphans
    await p.router.until(lambda: RejectReason.UNKNOWN in reasons(p))
    d.tier.is_draining = False
    d.tier.handle(Attach(make_request(2, prompt_of(40)), FIRST, local=False, lease_s=0.1))
    await d.router.until(lambda: RejectReason.UNKNOWN in reasons(d))
    assert pod.orphans == [(request.id, FIRST), (make_request(2, (1,)).id, FIRST)], "their records are to be closed"
    for side in (p, d):
        await side.tier.drained()
        await until_idle(side)


async def test_what_is_finished_after_its_router_has_gone_is_closed_too(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Leases.__init__.__kwdefaults__, "away_s", 0.5)
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(40))
    send(p, d, request)
    await p.router.until(lambda: Stage.PREFILLING in p.router.stages())
    await pod.lose_router(p, d)
    await pod.orphaned(1)
    assert pod.orphans == [(request.id, FIRST)]
    assert not d.router.of(Rejected)
    for side in (p, d):
        await side.tier.drained()
        await until_idle(side)


async def test_what_a_router_left_behind_is_let_go_long_before_its_lease(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dead, or has given us up: either way it has no more use for what waits, travels or runs here."""
    monkeypatch.setitem(Leases.__init__.__kwdefaults__, "away_s", 0.05)
    p, d = await pod.prefill(), await pod.decode()
    running, held = make_request(1, prompt_of(40), max_tokens=400), make_request(2, prompt_of(60))
    d.tier.handle(Attach(running, FIRST, local=True, lease_s=3600.0))
    await d.router.until(lambda: bool(d.router.tokens()))
    d.tier.is_draining = True
    p.tier.handle(Prefill(held, FIRST, d.peer, 3600.0))
    await p.router.until(lambda: RejectReason.REFUSED in reasons(p))
    await pod.lose_router(p, d)
    await pod.orphaned(2)
    for side in (p, d):
        await side.tier.drained()
        await until_idle(side)


async def test_what_is_offered_after_its_router_has_gone_is_let_go_soon_too(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker has not heard of it yet, and hands over what nobody will ask for."""
    monkeypatch.setitem(Leases.__init__.__kwdefaults__, "away_s", 0.05)
    p, d = await pod.prefill(), await pod.decode()
    await pod.lose_router(d)
    request = make_request(1, prompt_of(40))
    p.tier.handle(Prefill(request, FIRST, d.peer, 3600.0))
    await p.router.until(lambda: Stage.SEALED in p.router.stages())
    await pod.orphaned(1)
    assert pod.orphans == [(request.id, FIRST)]
    await pod.lose_router(p)
    for side in (p, d):
        await side.tier.drained()
        await until_idle(side)


async def test_a_choice_that_ends_at_its_first_token_does_not_keep_the_seat(pod: Pod) -> None:
    """With log probabilities, the first tokens are not repeated by the decode worker; their ends count all the same."""
    p, d = await pod.prefill(), await pod.decode()
    free = make_request(1, prompt_of(40), n=3, temperature=1.0)
    firsts = [alone(pod, free)[choice, 0] for choice in range(3)]
    assert len(set(firsts)) > 1, "the seed is to give different first tokens"
    params = SamplingParams(
        n=3, max_tokens=6, seed=1, temperature=1.0, logprobs=1, ignore_eos=True, stop_token_ids=(firsts[0],)
    ).checked()
    request = replace(free, params=params)
    send(p, d, request)
    await d.tier.drained()
    assert {token.choice for token in p.router.tokens() if token.finish is FinishReason.STOP} >= {0}
    assert served(p, d) == alone(pod, request)
    await p.tier.drained()
    assert await d.is_idle()


@pytest.mark.parametrize("local", [True, False])
async def test_a_choice_stopped_before_it_ran_never_runs(pod: Pod, local: bool) -> None:
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(120), n=2, max_tokens=40, temperature=1.0)
    if local:
        d.tier.handle(Attach(request, FIRST, local=True, lease_s=LEASE_S))
        d.tier.handle(Abort(request.id, FIRST, choices=(1,)))
    else:
        d.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
        d.tier.handle(Abort(request.id, FIRST, choices=(1,)))
        p.tier.handle(Abort(request.id, FIRST, choices=(1,)))  # nothing to a prefill worker: the prompt is shared
        p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
    await d.tier.drained()
    assert num_finished(d) == 1
    expected = alone(pod, request)
    assert {at: token for at, token in served(p, d).items() if at[0] == 0} == {
        at: token for at, token in expected.items() if at[0] == 0
    }
    await until_idle(p)
    await until_idle(d)


async def test_redirected_while_queued_only_the_second_decode_worker_hears_of_it(pod: Pod) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    busy, request = make_request(1, prompt_of(400, seed=1)), make_request(2, prompt_of(90))
    send(p, second, busy)
    send(p, first, request)
    first.tier.handle(Abort(request.id, FIRST))
    second.tier.handle(Attach(request, SECOND, local=False, lease_s=LEASE_S))
    p.tier.handle(Redirect(request.id, SECOND, second.peer))
    await second.router.until(lambda: num_finished(second) == 2)
    assert not first.router.stages()
    mine = {(t.choice, t.position): t.token for s in (p, second) for t in s.router.tokens() if t.request == request.id}
    assert mine == alone(pod, request)
    for side in (p, first, second):
        await side.tier.drained()
        await until_idle(side)


async def test_a_newer_try_at_the_same_decode_worker_while_the_older_is_receiving(pod: Pod) -> None:
    p, other, d = await pod.prefill("p0"), await pod.prefill("p1"), await pod.decode()
    request = make_request(1, prompt_of(300), temperature=0.8)
    send(p, d, request)
    await p.router.until(lambda: Stage.STREAMING in p.router.stages())
    send(other, d, request, SECOND)
    await d.router.until(lambda: num_finished(d) == 1)
    tokens = {(t.choice, t.position): t.token for s in (other, d) for t in s.router.tokens()}
    assert tokens == alone(pod, request)
    p.tier.handle(Abort(request.id, FIRST))  # said at the same time; whichever comes first, nothing is left
    for side in (p, other, d):
        await side.tier.drained()
        await until_idle(side)


async def test_the_count_of_held_prompts_goes_down_again(pod: Pod) -> None:
    p, d = await pod.prefill(max_held=1), await pod.decode()
    d.tier.is_draining = True
    for number in (1, 2):
        request = make_request(number, prompt_of(40, seed=number))
        p.tier.handle(Prefill(request, FIRST, d.peer, LEASE_S))
        await p.router.until(lambda number=number: num_computed(p) == number)
    await p.router.until(lambda: RejectReason.FULL in reasons(p))
    dropped = next(each for each in p.router.of(Rejected) if each.reason is RejectReason.FULL)
    assert dropped.request == make_request(2, (1,)).id, "the newest goes"
    p.tier.handle(Abort(make_request(1, (1,)).id, FIRST))
    await p.tier.drained()
    assert held_metric(p) == 0
    await until_idle(p)


def num_computed(side: Side) -> int:
    return side.router.stages().count(Stage.SEALED)


def held_metric(side: Side) -> float:
    lines = side.metrics.render().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tandem_held_requests"))


async def test_a_worker_that_closes_gives_back_what_it_has_not_finished(pod: Pod) -> None:
    p, d, other = await pod.prefill(), await pod.decode(), await pod.decode("d1")
    waiting, running = make_request(1, prompt_of(60)), make_request(2, prompt_of(40), max_tokens=400)
    done, unclaimed = make_request(3, prompt_of(20), max_tokens=1), make_request(4, prompt_of(30))
    other.tier.is_draining = True  # refuses, so that the blocks are held
    p.tier.handle(Prefill(waiting, FIRST, other.peer, LEASE_S))
    p.tier.handle(Prefill(unclaimed, FIRST, d.peer, LEASE_S))
    for request in (running, done):
        d.tier.handle(Attach(request, FIRST, local=True, lease_s=LEASE_S))
    await p.router.until(lambda: RejectReason.REFUSED in reasons(p))
    await d.router.until(lambda: num_finished(d) == 1 and Stage.ADOPTED in d.router.stages())
    await d.router.until(lambda: any(token.request == running.id for token in d.router.tokens()))
    for side in (p, d):
        await side.tier.close()
    assert (waiting.id, RejectReason.DRAINING) in [(each.request, each.reason) for each in p.router.of(Rejected)]
    assert [(each.request, each.reason) for each in d.router.of(Rejected)] == [(running.id, RejectReason.DRAINING)]
    for side in (p, d):
        await until_idle(side)
