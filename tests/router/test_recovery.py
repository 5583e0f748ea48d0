"""What is done about every trouble: the table itself, and the messages that follow from it."""

from __future__ import annotations

import dataclasses

import pytest

from proto.control import Abort, Failed, Prefill, Redirect, RejectReason, Role
from proto.errors import (
    InvalidRequest,
    LocalFault,
    NotFinite,
    NotSupported,
    NoWorker,
    Overloaded,
    TandemError,
    UserError,
    WorkerLost,
)
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage
from router.recovery import Remedy, Side, Situation, after_loss, after_rejection, error_of
from tests.support.fleet import House, read_all, token

TWO_AND_TWO = ("p1", "p2", "d1", "d2")


def situation(**changes: bool) -> Situation:
    facts = dict.fromkeys(("prefill_has_blocks", "offered", "adopted", "started", "lacks_first"), False)
    return Situation(**{**facts, **changes})


@pytest.mark.parametrize(
    ("side", "facts", "remedy"),
    [
        (Side.PREFILL, situation(lacks_first=True), Remedy.RESTART),
        (Side.PREFILL, situation(lacks_first=True, started=True), Remedy.RESUME),
        (Side.PREFILL, situation(started=True, offered=True), Remedy.AWAIT_VERDICT),
        (Side.PREFILL, situation(started=True), Remedy.RESUME),
        (Side.PREFILL, situation(started=True, adopted=True), Remedy.NONE),
        (Side.PREFILL, situation(adopted=True, lacks_first=True), Remedy.RESTART),
        (Side.DECODE, situation(prefill_has_blocks=True), Remedy.REDIRECT),
        (Side.DECODE, situation(prefill_has_blocks=True, started=True), Remedy.REDIRECT),
        (Side.DECODE, situation(adopted=True, started=True), Remedy.RESUME),
        (Side.DECODE, situation(adopted=True), Remedy.RESTART),
    ],
)
def test_after_a_loss(side: Side, facts: Situation, remedy: Remedy) -> None:
    assert after_loss(side, facts) is remedy


@pytest.mark.parametrize("reason", list(RejectReason))
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_a_rejection_by_prefill_before_adoption_goes_on_from_held_blocks_alone(
    reason: RejectReason, held: bool, started: bool
) -> None:
    facts = situation(prefill_has_blocks=True, started=started, lacks_first=not started)
    remedy = after_rejection(Side.PREFILL, reason, held, facts)
    if held and reason is RejectReason.STALE:
        assert remedy is Remedy.AWAIT_VERDICT
    elif held and reason in (RejectReason.REFUSED, RejectReason.MISMATCH, RejectReason.PEER_LOST):
        assert remedy is Remedy.REDIRECT
    else:
        assert remedy is (Remedy.RESUME if started else Remedy.RESTART)


@pytest.mark.parametrize("reason", list(RejectReason))
def test_prefill_has_no_say_after_adoption(reason: RejectReason) -> None:
    assert after_rejection(Side.PREFILL, reason, True, situation(adopted=True, started=True)) is Remedy.NONE


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequest), (404, UserError), (429, Overloaded), (501, NotSupported), (500, LocalFault)],
)
def test_a_workers_error_keeps_its_meaning(status: int, kind: type[TandemError]) -> None:
    error = error_of(Failed(RequestId("r.1"), Generation(1), status, "k", "why", "n"), "queued")
    assert type(error) is kind
    assert (error.message, error.param, error.stage) == ("why", "n", "queued")


async def test_prefill_lost_before_the_first_token_means_the_next_one() -> None:
    house = House(*TWO_AND_TWO)
    stream = await house.start()
    first, _ = house.last_prefill()
    house.kill(first)
    second, prefill = house.last_prefill()
    assert second != first
    assert prefill.generation == 2
    assert prefill.request.forced == ()
    assert house.heard.remedies == [Remedy.RESTART]
    house.says(second, token(stream.id, 0))
    house.says(house.last_attach()[0], token(stream.id, 1, last=True))
    assert [out.position for out in await read_all(stream)] == [0, 1]


async def test_the_last_prefill_worker_lost_means_local() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.kill("p1")
    _, attach = house.last_attach()
    assert (attach.local, attach.generation) == (True, 2)
    assert house.aborts_to("d1") == [Abort(stream.id, Generation(1))]
    house.says("d1", token(stream.id, 0, last=True))
    assert len(await read_all(stream)) == 1


async def test_refused_blocks_are_redirected_without_a_new_prefill() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    second, attach = house.last_attach()
    to, redirect = house.last_redirect()
    assert second != first
    assert (attach.local, attach.generation) == (False, 2)
    assert (to, redirect.generation, redirect.decode.worker) == ("p1", 2, second)
    assert len([m for m in house.sent_to("p1") if isinstance(m, Prefill)]) == 1
    assert house.aborts_to(first) == [Abort(stream.id, Generation(1))]
    # What P sent before it heard of the redirect is as good as ever.
    house.says("p1", token(stream.id, 0), generation=1)
    house.says(second, token(stream.id, 1, last=True))
    assert [out.position for out in await read_all(stream)] == [0, 1]


async def test_decode_lost_before_adoption_means_redirect_also_after_the_first_token() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.kill(first)
    assert house.last_redirect()[1].decode.worker == house.last_attach()[0] != first
    assert house.heard.remedies == [Remedy.REDIRECT]
    # P's own news of the same loss comes late, and changes nothing.
    house.rejects("p1", stream.id, RejectReason.PEER_LOST, held=True, generation=1)
    assert house.heard.remedies == [Remedy.REDIRECT]


@pytest.mark.parametrize("by", ["kill", "reject"])
async def test_decode_lost_after_adoption_resumes_with_what_was_sent(by: str) -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start(n=2)
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0), token(stream.id, 0, choice=1))
    house.reports(first, stream.id, Stage.ADOPTED)
    house.says(first, token(stream.id, 1), token(stream.id, 1, choice=1, last=True))
    house.says(first, token(stream.id, 2))
    assert len(await anext(stream)) == 5
    if by == "kill":
        house.kill(first)
    else:
        house.rejects(first, stream.id, RejectReason.DRAINING)
    second, attach = house.last_attach()
    assert second != first
    assert (attach.local, attach.generation, attach.positions) == (True, 2, (3, 2))
    assert attach.request.forced == ((0, 1, 2), (1000, 1001))
    assert attach.request.seed == 7
    assert Abort(stream.id, Generation(2), (1,)) in house.aborts_to(second)  # that choice is complete
    house.says(first, token(stream.id, 3, value=5), generation=1)  # the dead one's last words
    house.says(second, token(stream.id, 3, last=True))
    assert await read_all(stream) == [token(stream.id, 3, last=True)]
    assert "stale" in house.heard.refusals or by == "kill"


async def test_a_resume_prefers_equal_numerics() -> None:
    house = House("p1", "d1", "d2", "d3")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.says(first, token(stream.id, 1))
    others = [epoch for epoch in house.fleet.workers if epoch.startswith("epoch-d") and not epoch.endswith(first)]
    same, different = others
    house.fleet.workers[different] = dataclasses.replace(house.fleet.workers[different], numerics="other")
    house.index.stored(different, house.fleet.hasher().full_blocks(tuple(range(10))))
    house.kill(first)
    assert f"epoch-{house.last_attach()[0]}" == same


async def test_what_came_before_an_impossible_token_is_delivered_and_not_asked_for_again() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.says(first, token(stream.id, 1), token(stream.id, 2), token(stream.id, 3, choice=7), token(stream.id, 3))
    assert [out.position for out in await anext(stream)] == [0, 1, 2]
    assert house.fleet.faults == [first]
    second, attach = house.last_attach()
    assert (attach.generation, attach.request.forced) == (2, ((0, 1, 2),))
    house.says(second, token(stream.id, 3, last=True))
    assert await read_all(stream) == [token(stream.id, 3, last=True)]


async def test_prefill_lost_after_the_first_token_waits_for_decodes_word() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.kill("p1")
    assert house.heard.remedies == []
    house.reports("d1", stream.id, Stage.ADOPTED)
    house.timers.advance(60.0)
    assert house.heard.remedies == []
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_prefill_lost_before_its_seal_arrived_means_resume() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.kill("p1")
    house.rejects("d1", stream.id, RejectReason.PEER_LOST)
    _, attach = house.last_attach()
    assert (attach.local, attach.generation, attach.request.forced) == (True, 2, ((0,),))
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_a_verdict_that_never_comes_is_a_resume_too() -> None:
    house = House("p1", "d1", verdict_s=5.0)
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.kill("p1")
    house.timers.advance(5.5)
    assert house.fleet.faults == ["d1"]
    assert house.last_attach()[1].request.forced == ((0,),)
    await stream.aclose()


async def test_adopted_but_the_first_token_died_with_prefill() -> None:
    """D has the whole prompt and sends position 1, but position 0 was lost: the client cannot go on from there."""
    house = House("p1", "d1", "d2")
    stream = await house.start()
    house.says(house.last_attach()[0], token(stream.id, 1))
    house.kill("p1")
    assert house.heard.remedies == [Remedy.RESTART]
    to, attach = house.last_attach()
    assert attach.local
    house.says(to, token(stream.id, 0), token(stream.id, 1), token(stream.id, 2, last=True))
    assert [out.position for out in await read_all(stream)] == [0, 1, 2]


async def test_decode_that_lost_sight_of_a_living_prefill_is_replaced() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.rejects(first, stream.id, RejectReason.PEER_LOST)
    assert house.last_redirect()[1].decode.worker != first
    await stream.aclose()


@pytest.mark.parametrize("reason", [RejectReason.UNKNOWN, RejectReason.STALE])
async def test_a_worker_that_cannot_does_not_get_the_request_again(reason: RejectReason) -> None:
    """It is idle, and so the cheapest; its tries would all be spent there."""
    house = House("p1", "p2", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_prefill()
    house.rejects(first, stream.id, reason)
    second, _ = house.last_prefill()
    assert second != first
    house.says(second, token(stream.id, 0))
    decode, _ = house.last_attach()
    house.reports(decode, stream.id, Stage.ADOPTED)
    house.rejects(decode, stream.id, reason)
    assert house.last_attach()[0] != decode
    assert house.fleet.faults == ([first, decode] if reason is RejectReason.UNKNOWN else [])
    await stream.aclose()


async def test_a_prefill_worker_whose_death_the_decode_worker_saw_first() -> None:
    """The blocks are redirected to a worker that will never be offered them, and so cannot say that it lacks any."""
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.rejects(first, stream.id, RejectReason.PEER_LOST)
    assert house.heard.remedies == [Remedy.REDIRECT]
    house.kill("p1")
    assert house.heard.remedies == [Remedy.REDIRECT, Remedy.RESUME]
    assert house.fleet.faults == []
    to, attach = house.last_attach()
    assert (attach.local, attach.generation, attach.request.forced) == (True, 3, ((0,),))
    house.says(to, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_prefill_lost_after_a_redirect_that_went_well() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.kill(house.last_attach()[0])
    second, _ = house.last_attach()
    house.reports(second, stream.id, Stage.SEALED)
    house.kill("p1")
    assert house.heard.remedies == [Remedy.REDIRECT]
    house.says(second, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_a_full_queue_means_another_worker_and_then_429() -> None:
    house = House("p1", "p2", "d1")
    stream = await house.start()
    first, _ = house.last_prefill()
    house.rejects(first, stream.id, RejectReason.FULL, retry_after_s=3.0)
    second, _ = house.last_prefill()
    assert second != first
    house.rejects(second, stream.id, RejectReason.FULL, retry_after_s=2.0)
    with pytest.raises(Overloaded) as caught:
        await anext(stream)
    assert caught.value.retry_after_s == 2.0
    # Both are known to be full now: the next request is turned away before any work.
    house.fleet.sent.clear()
    with pytest.raises(Overloaded):
        await house.start()
    assert not house.fleet.sent
    house.timers.advance(3.0)
    await house.start()


async def test_a_later_prompt_of_a_request_waits_for_its_turn_where_all_queues_are_full() -> None:
    house = House("p1", "d1")
    first, second = await house.start(), await house.start(is_later=True)
    house.rejects("p1", second.id, RejectReason.FULL, retry_after_s=2.0)
    third = await house.start(is_later=True)
    assert house.flow.num_waiting == 2
    with pytest.raises(Overloaded):
        await house.start()
    house.timers.advance(2.5)
    assert house.flow.num_waiting == 0
    # The one that was turned away there is the decode worker's alone now.
    for stream, prefill, generation in ((first, "p1", 1), (second, "d1", 2), (third, "p1", 1)):
        house.says(prefill, token(stream.id, 0), generation=generation)
        house.says("d1", token(stream.id, 1, last=True), generation=generation)
        assert len(await read_all(stream)) == 2


async def test_a_resume_is_never_answered_429() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.says(first, token(stream.id, 1))
    house.kill(first)
    second, _ = house.last_attach()
    house.rejects(second, stream.id, RejectReason.FULL, retry_after_s=2.0)
    assert house.flow.num_waiting == 1
    house.timers.advance(4.0)
    assert house.flow.num_waiting == 0
    to, attach = house.last_attach()
    assert (to, attach.request.forced) == (second, ((0, 1),))
    house.says(second, token(stream.id, 2, last=True))
    assert len(await read_all(stream)) == 3


async def test_a_full_decode_worker_alone_is_asked_again_while_the_blocks_are_held() -> None:
    house = House("p1", "d1", max_attempts=2)
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    for _ in range(5):
        house.rejects("p1", stream.id, RejectReason.REFUSED, held=True, retry_after_s=0.5)
        assert house.flow.num_waiting == 1
        house.timers.advance(0.4)
        assert house.flow.num_waiting == 1
        house.timers.advance(1.0)
        assert house.flow.num_waiting == 0
    assert len([m for m in house.sent_to("p1") if isinstance(m, Redirect)]) == 5
    house.reports("d1", stream.id, Stage.ADOPTED)
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_what_is_being_computed_is_not_turned_away_when_there_is_no_room_for_long() -> None:
    house = House("p1", "d1", room_patience_s=20.0)
    stream = await house.start()
    for _ in range(100):
        house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
        house.timers.advance(1.0)
    assert not house.last_attach()[1].local
    house.says("p1", token(stream.id, 0))
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    attach = house.last_attach()[1]
    assert (attach.local, attach.request.forced) == (True, ((0,),)), "goes ahead of new work there"
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_a_prefill_worker_that_has_not_heard_of_the_adoption_is_told_to_let_go() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.reports("d1", stream.id, Stage.ADOPTED)
    house.rejects("p1", stream.id, RejectReason.PEER_LOST, held=True)
    assert house.heard.remedies == []
    assert house.aborts_to("p1") == [Abort(stream.id, Generation(1))]
    assert house.aborts_to("d1") == []
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


@pytest.mark.parametrize("stage", [None, Stage.QUEUED, Stage.PREFILLING])
async def test_what_a_draining_worker_gives_back_is_turned_away_only_if_it_had_not_begun(stage: Stage | None) -> None:
    house = House("p1", "p2", "d1")
    stream = await house.start()
    first = house.last_prefill()[0]
    other = "p2" if first == "p1" else "p1"
    if stage is not None:
        house.reports(first, stream.id, stage)
    house.rejects(first, stream.id, RejectReason.DRAINING, held=False)
    assert house.last_prefill()[0] == other
    house.rejects(other, stream.id, RejectReason.FULL, held=False)
    if stage is not Stage.PREFILLING:
        with pytest.raises(Overloaded):
            await anext(stream)
        return
    assert house.flow.num_waiting == 1
    house.timers.advance(5.0)
    assert house.flow.num_waiting == 0
    assert house.last_attach()[1].generation == 3
    await stream.aclose()


async def test_waiting_for_a_decode_worker_when_prefill_lets_go() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    house.rejects("p1", stream.id, RejectReason.UNKNOWN, held=False)
    house.timers.advance(2.0)
    assert house.last_prefill()[1].generation == 2
    await stream.aclose()


async def test_waiting_for_a_decode_worker_when_prefill_dies() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.kill("d1")
    assert house.flow.num_waiting == 1
    house.kill("p1")
    house.join("d2", Role.DECODE)
    to, attach = house.last_attach()
    assert (to, attach.local, attach.request.forced) == ("d2", True, ((0,),))
    await stream.aclose()


async def test_a_worker_that_comes_in_time_takes_over() -> None:
    house = House("p1", "d1", patience_s=10.0)
    stream = await house.start()
    house.kill("d1")
    house.timers.advance(5.0)
    house.join("d2", Role.DECODE)
    assert house.last_redirect()[1].decode.worker == "d2"
    house.says("p1", token(stream.id, 0))
    house.says("d2", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_a_new_request_waits_for_the_worker_that_left_a_moment_ago() -> None:
    house = House("d1", patience_s=10.0)
    first = await house.start()
    house.kill("d1")
    house.timers.advance(3.0)
    second = await house.start()
    assert (house.flow.num_waiting, house.heard.local) == (2, [True])
    house.join("d2", Role.DECODE)
    assert house.heard.local == [True, True]
    for stream in (first, second):
        house.says("d2", token(stream.id, 0, last=True), generation=2 if stream is first else 1)
        assert len(await read_all(stream)) == 1
    house.kill("d2")
    third = await house.start()
    house.timers.advance(11.0)
    with pytest.raises(WorkerLost, match="no decode worker"):
        await anext(third)
    with pytest.raises(NoWorker):
        await house.start()


async def test_patience_ends_with_an_error_that_names_the_stage() -> None:
    house = House("p1", "d1", patience_s=10.0)
    stream = await house.start()
    house.reports("p1", stream.id, Stage.STREAMING)
    house.kill("d1")
    house.timers.advance(12.0)
    with pytest.raises(WorkerLost, match="streaming"):
        await anext(stream)
    assert house.aborts_to("p1")


async def test_attempts_are_bounded_and_the_error_names_the_stage() -> None:
    house = House("p1", "d1", "d2", max_attempts=3)
    stream = await house.start()
    for _ in range(3):
        house.rejects(house.last_attach()[0], stream.id, RejectReason.STALE)
        house.timers.advance(2.0)
    with pytest.raises(WorkerLost) as caught:
        await anext(stream)
    assert caught.value.stage == "routed"
    assert house.flow.num_inflight == 0


@pytest.mark.parametrize("reason", [RejectReason.MISMATCH, RejectReason.PEER_LOST])
@pytest.mark.parametrize("has_first", [True, False])
async def test_blocks_that_no_decode_worker_gets_are_computed_elsewhere(reason: RejectReason, has_first: bool) -> None:
    """Their holder is cut off from the decode workers, or has no transport in common with them."""
    house = House("p1", "d1", "d2")
    house.index.stored(Epoch("epoch-p1"), house.fleet.hasher().full_blocks(range(10)))
    stream = await house.start()
    if has_first:
        house.says("p1", token(stream.id, 0))
    offered = [house.last_attach()[0]]
    house.rejects("p1", stream.id, reason, held=True)
    offered.append(house.last_attach()[0])
    assert sorted(offered) == ["d1", "d2"]
    house.rejects("p1", stream.id, reason, held=True)
    to, attach = house.last_attach()
    assert (attach.local, attach.generation, attach.request.forced) == (True, 3, ((0,),) if has_first else ())
    assert Abort(stream.id, Generation(2)) in house.aborts_to("p1")
    house.says(to, token(stream.id, 0), token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_blocks_that_no_decode_worker_gets_are_computed_by_another_prefill_worker_first() -> None:
    house = House("p1", "p2", "d1")
    stream = await house.start()
    first, _ = house.last_prefill()
    house.rejects(first, stream.id, RejectReason.PEER_LOST, held=True)
    second, prefill = house.last_prefill()
    assert (second != first, prefill.generation, prefill.decode.worker) == (True, 2, "d1")
    await stream.aclose()


async def test_a_protocol_break_and_our_own_fault_are_held_against_the_worker() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0, choice=7))
    assert house.fleet.faults == ["p1"]
    failed = Failed(stream.id, house.last_attach()[1].generation, 400, "k", "too long", "prompt")
    house.flow.message_came(Epoch("epoch-d1"), failed)
    assert house.fleet.faults == ["p1"]
    second = await house.start()
    generation = house.last_attach()[1].generation
    house.flow.message_came(Epoch("epoch-d1"), Failed(second.id, generation, 500, "k", "a bug"))
    assert house.fleet.faults == ["p1", "d1"]


def gives_no_numbers(house: House, worker: str, request: RequestId, generation: int) -> None:
    failed = Failed(request, Generation(generation), 500, NotFinite.kind, "not finite")
    house.flow.message_came(Epoch(f"epoch-{worker}"), failed)


async def test_where_numbers_were_not_finite_is_at_fault_if_another_worker_serves_the_request() -> None:
    house = House("p1", "p2", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_prefill()
    gives_no_numbers(house, first, stream.id, 1)
    second, prefill = house.last_prefill()
    assert (second != first, prefill.generation) == (True, 2)
    assert house.fleet.faults == []
    to, _ = house.last_attach()
    house.says(second, token(stream.id, 0))
    house.says(to, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2
    assert house.fleet.faults == [first]


async def test_numbers_that_are_finite_nowhere_are_the_requests_fault() -> None:
    """Also where the client has tokens already."""
    house = House("p1", "p2", "d1", "d2")
    stream = await house.start()
    p, _ = house.last_prefill()
    first, _ = house.last_attach()
    house.says(p, token(stream.id, 0))
    house.says(first, token(stream.id, 1))
    gives_no_numbers(house, first, stream.id, 1)
    second, attach = house.last_attach()
    assert second != first
    gives_no_numbers(house, second, stream.id, attach.generation)
    assert len(await anext(stream)) > 0
    with pytest.raises(NotFinite, match="not finite"):
        await read_all(stream)
    assert house.fleet.faults == []


async def test_the_last_attempt_says_that_its_numbers_were_not_finite() -> None:
    house = House("p1", "d1", max_attempts=1)
    stream = await house.start()
    gives_no_numbers(house, "p1", stream.id, 1)
    with pytest.raises(NotFinite):
        await read_all(stream)


async def test_prefill_that_released_before_a_redirect_reached_it() -> None:
    """Adopted reached P, but not the router, before D died."""
    house = House("p1", "d1", "d2")
    stream = await house.start()
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.kill(first)
    house.reports("p1", stream.id, Stage.ADOPTED, generation=1)
    assert not house.flow.num_waiting
    house.index.stored(Epoch("epoch-p1"), house.fleet.hasher().full_blocks(range(10)))
    house.rejects("p1", stream.id, RejectReason.UNKNOWN)
    assert house.fleet.faults == []
    to, attach = house.last_attach()
    assert (attach.local, attach.request.forced) == (False, ((0,),))
    assert house.last_prefill()[1].generation == attach.generation == 3, "what it has let go of, it has cached"
    house.says("p1", token(stream.id, 1))
    house.says(to, token(stream.id, 2, last=True))
    assert len(await read_all(stream)) == 3
