"""A decode worker dies in mid-stream: who has the blocks goes on with the request, and what if that fails too."""

from __future__ import annotations

import dataclasses

import pytest

from proto.control import Abort, Attach, Failed, Prefill, RejectReason, Role
from proto.errors import WorkerLost
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage
from router.deadlines import StageLimits
from router.flow import RequestStream
from router.recovery import Remedy
from tests.support.fleet import House, read_all, token

PROMPT = tuple(range(40))
SENT = (0, 1, 2)
"""What the client has when the decode worker dies."""


def caches(house: House, name: str, num_tokens: int = len(PROMPT)) -> None:
    """That worker has the prompt's leading blocks."""
    house.index.stored(Epoch(f"epoch-{name}"), house.fleet.hasher().full_blocks(PROMPT[:num_tokens]))


async def decoding(house: House, **params: object) -> tuple[RequestStream, str]:
    """A request whose client has three tokens of each choice, and its decode worker. p1 has the prompt cached."""
    caches(house, "p1")
    stream = await house.start(PROMPT, **params)
    decode, attach = house.last_attach()
    choices = range(attach.request.params.n)
    house.says(house.last_prefill()[0], *(token(stream.id, 0, choice=choice) for choice in choices))
    house.reports(decode, stream.id, Stage.ADOPTED)
    for position in SENT[1:]:
        house.says(decode, *(token(stream.id, position, choice=choice) for choice in choices))
    assert len(await anext(stream)) == len(SENT) * len(choices)
    return stream, decode


async def relayed(house: House) -> tuple[RequestStream, str]:
    """The same after that worker's death: p1 is to hand the blocks to the decode worker that is returned."""
    stream, first = await decoding(house)
    house.kill(first)
    assert house.last_prefill()[1].generation == 2
    return stream, house.last_attach()[0]


def is_alone(house: House, generation: int) -> bool:
    """The last try is a decode worker's own, with what the client has."""
    attach = house.last_attach()[1]
    return (attach.local, attach.generation, attach.request.forced[0][:3]) == (True, generation, SENT)


async def test_the_prefill_worker_that_has_the_prompt_is_where_a_resume_comes_from() -> None:
    house = House("p1", "d1", "d2")
    stream, first = await decoding(house)
    house.kill(first)
    second, attach = house.last_attach()
    assert second != first
    assert (attach.local, attach.generation, attach.positions) == (False, 2, (3,))
    to, prefill = house.last_prefill()
    assert (to, prefill.generation, prefill.decode.worker) == ("p1", 2, second)
    assert prefill.request == attach.request
    assert (prefill.request.forced, prefill.request.seed) == ((SENT,), 7)
    # Both say the next token, as for any hand-off; the client reads it once.
    house.says(second, token(stream.id, 3), token(stream.id, 4))
    house.says("p1", token(stream.id, 3))
    house.reports(second, stream.id, Stage.ADOPTED)
    house.says(second, token(stream.id, 5, last=True))
    assert [out.token for out in await read_all(stream)] == [3, 4, 5]
    assert house.heard.remedies == [Remedy.RESUME]
    assert [end.stage for end in house.heard.ends] == [Stage.FINISHED]


async def test_the_next_token_is_the_prefill_workers_to_say() -> None:
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    house.says(second, token(stream.id, 4), token(stream.id, 5, last=True))
    house.timers.advance(1.0)
    house.says("p1", token(stream.id, 3))
    assert [out.token for out in await read_all(stream)] == [3, 4, 5]


async def test_a_request_that_its_next_token_ends() -> None:
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    house.says("p1", token(stream.id, 3, last=True))
    assert [out.token for out in await read_all(stream)] == [3]
    assert house.aborts_to("p1")[-1] == house.aborts_to(second)[-1] == Abort(stream.id, Generation(2))


@pytest.mark.parametrize(
    ("p_has", "d_has", "threshold", "is_relayed"),
    [
        (40, 0, 16, True),
        (40, 40, 16, False),
        (40, 28, 16, False),
        (12, 0, 16, False),
        (40, 24, 16, True),
        (0, 0, 0, False),
    ],
)
async def test_who_has_enough_of_it_computes_the_rest(p_has: int, d_has: int, threshold: int, is_relayed: bool) -> None:
    """The sum is 43 tokens. A decode worker that lacks fewer than the threshold does without a prefill worker; one
    that spares it less than that is not worth the way."""
    house = House("p1", "d1", "d2", threshold=threshold)
    stream, first = await decoding(house)
    house.index.cleared(Epoch("epoch-p1"))
    caches(house, "p1", p_has)
    caches(house, "d1" if first == "d2" else "d2", d_has)
    house.kill(first)
    assert house.last_attach()[1].local is not is_relayed
    await stream.aclose()


async def test_what_was_generated_is_looked_for_too() -> None:
    """After a resume the blocks of generated tokens are cached as well."""
    house = House("p1", "d1", "d2", threshold=4)
    stream, first = await decoding(house)
    house.says(first, token(stream.id, 3), token(stream.id, 4), token(stream.id, 5), token(stream.id, 6))
    other = Epoch("epoch-d1" if first == "d2" else "epoch-d2")
    house.index.stored(other, house.fleet.hasher().full_blocks((*PROMPT, 0, 1, 2, 3, 4, 5, 6)))
    house.kill(first)
    assert house.last_attach()[1].local
    await stream.aclose()


async def test_choices_that_have_gone_different_ways_stay_on_the_decode_worker() -> None:
    house = House("p1", "d1", "d2")
    stream, first = await decoding(house, n=2)
    house.kill(first)
    attach = house.last_attach()[1]
    assert (attach.local, attach.request.forced) == (True, (SENT, (1000, 1001, 1002)))
    await stream.aclose()


async def test_equal_numerics_come_before_the_cache() -> None:
    house = House("p1", "p2", "d1", "d2", "d3")
    stream, first = await decoding(house)
    same, other = [name for name in ("d1", "d2", "d3") if name != first]
    for name in (other, "p1"):
        epoch = Epoch(f"epoch-{name}")
        house.fleet.workers[epoch] = dataclasses.replace(house.fleet.workers[epoch], numerics="other")
    caches(house, other, 28)
    caches(house, "p2", 36)
    house.kill(first)
    assert (house.last_prefill()[0], house.last_attach()[0]) == ("p2", same)
    await stream.aclose()


@pytest.mark.parametrize(
    ("reason", "counts"),
    [
        (RejectReason.FULL, False),
        (RejectReason.DRAINING, False),
        (RejectReason.UNKNOWN, True),
        (RejectReason.STALE, True),
    ],
)
async def test_a_prefill_worker_that_will_not_leaves_it_to_the_decode_worker(
    reason: RejectReason, counts: bool
) -> None:
    house = House("p1", "d1", "d2", max_attempts=4)
    stream, second = await relayed(house)
    caches(house, "p1")
    house.rejects("p1", stream.id, reason, retry_after_s=3.0)
    assert is_alone(house, 3)
    assert house.last_attach()[0] == second
    assert Abort(stream.id, Generation(2)) in house.aborts_to(second)
    house.says(second, token(stream.id, 3, last=True))
    assert [out.token for out in await read_all(stream)] == [3]
    assert house.heard.remedies == [Remedy.RESUME, Remedy.RESUME]


async def test_what_a_resume_finds_cached_was_computed_for_it() -> None:
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    before = stream.num_cached
    house.reports("p1", stream.id, Stage.PREFILLING, num_cached=before + 9)
    house.says("p1", token(stream.id, 3))
    house.says(second, token(stream.id, 4, last=True))
    await read_all(stream)
    assert stream.num_cached == before


async def test_a_prefill_worker_without_room_for_it_is_no_verdict_on_the_request() -> None:
    """The client has tokens already: another worker could serve it, and can."""
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    house.flow.message_came(Epoch("epoch-p1"), Failed(stream.id, Generation(2), 400, "k", "too long", "prompt"))
    assert is_alone(house, 3)
    house.says(second, token(stream.id, 3, last=True))
    assert len(await read_all(stream)) == 1


async def test_a_decode_worker_without_room_for_it_is_no_verdict_either() -> None:
    house = House("p1", "d1", "d2", "d3")
    stream, second = await relayed(house)
    house.flow.message_came(Epoch(f"epoch-{second}"), Failed(stream.id, Generation(2), 400, "k", "too long", "prompt"))
    third, attach = house.last_attach()
    assert third != second
    assert house.last_redirect()[1].decode.worker == third
    assert attach.request.forced == (SENT,)
    await stream.aclose()


async def test_who_can_never_go_on_is_not_asked_for_ever() -> None:
    house = House("d1", max_attempts=3)
    stream = await house.start(PROMPT)
    house.says("d1", token(stream.id, 0))
    house.rejects("d1", stream.id, RejectReason.UNKNOWN)
    house.timers.advance(2.0)
    for _ in range(2):
        generation = house.last_attach()[1].generation
        house.flow.message_came(Epoch("epoch-d1"), Failed(stream.id, generation, 400, "k", "too long"))
        house.timers.advance(2.0)
    assert len(await anext(stream)) == 1
    with pytest.raises(WorkerLost, match="3 attempts"):
        await anext(stream)


async def test_the_prefill_worker_dies_before_it_has_said_the_next_token() -> None:
    house = House("p1", "p2", "d1", "d2")
    caches(house, "p2")
    stream, first = await decoding(house)
    house.kill(first)
    to, _ = house.last_prefill()
    house.kill(to)
    assert is_alone(house, 3), "once is enough"
    house.says(house.last_attach()[0], token(stream.id, 3, last=True))
    assert len(await read_all(stream)) == 1


async def test_the_prefill_worker_dies_after_it_has_said_the_next_token() -> None:
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    house.says("p1", token(stream.id, 3))
    house.kill("p1")
    assert house.heard.remedies == [Remedy.RESUME]
    house.reports(second, stream.id, Stage.ADOPTED)
    house.timers.advance(60.0)
    house.says(second, token(stream.id, 4, last=True))
    assert [out.token for out in await read_all(stream)] == [3, 4]


async def test_a_silent_prefill_worker_is_given_up() -> None:
    house = House("p1", "d1", "d2", limits=StageLimits(queued_s=20.0))
    stream, _ = await relayed(house)
    house.timers.advance(21.0)
    assert house.fleet.faults == ["p1"]
    assert is_alone(house, 3)
    assert Abort(stream.id, Generation(2)) in house.aborts_to("p1")
    house.says("p1", token(stream.id, 3, value=99), generation=2)
    house.says(house.last_attach()[0], token(stream.id, 3, last=True))
    assert [out.token for out in await read_all(stream)] == [3]


async def test_the_next_decode_worker_dies_too_before_it_has_the_blocks() -> None:
    """The third is offered the very blocks that the second was, whatever the client has by then."""
    house = House("p1", "d1", "d2", "d3")
    stream, second = await relayed(house)
    house.says("p1", token(stream.id, 3))
    house.kill(second)
    third, attach = house.last_attach()
    assert house.last_redirect()[1].decode.worker == third
    assert (attach.local, attach.request.forced, attach.generation) == (False, (SENT,), 3)
    assert sum(isinstance(message, Prefill) for message in house.sent_to("p1")) == 2
    house.says(third, token(stream.id, 3), token(stream.id, 4, last=True))
    assert [out.token for out in await read_all(stream)] == [3, 4]


async def test_where_nobody_has_room_for_the_blocks_a_decode_worker_queues_the_resume() -> None:
    house = House("p1", "d1", "d2", "d3", max_attempts=3)
    stream, second = await relayed(house)
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True, retry_after_s=30.0)
    third = house.last_redirect()[1].decode.worker
    assert third != second
    assert not house.last_attach()[1].local
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True, retry_after_s=30.0)
    assert is_alone(house, 4), "at once: it goes ahead of new work there"
    assert Abort(stream.id, Generation(3)) in house.aborts_to("p1")
    house.says(house.last_attach()[0], token(stream.id, 3, last=True))
    assert len(await read_all(stream)) == 1


async def test_what_is_under_way_is_not_turned_away_when_there_is_no_room_for_long() -> None:
    house = House("p1", "d1", room_patience_s=20.0)
    stream = await house.start(PROMPT)
    house.says("p1", token(stream.id, 0))
    for _ in range(100):
        if not house.last_attach()[1].local:
            house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
            house.timers.advance(1.0)
    attach = house.last_attach()[1]
    assert (attach.local, attach.request.forced) == (True, ((0,),))
    house.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_a_prefill_worker_that_lets_go_while_the_request_waits() -> None:
    house = House("p1", "d1", "d2")
    stream, second = await relayed(house)
    house.kill(second)
    assert house.flow.num_waiting == 1
    house.rejects("p1", stream.id, RejectReason.FULL, generation=2)
    house.join("d3", Role.DECODE)
    assert house.last_attach()[0] == "d3"
    assert is_alone(house, 3)
    await stream.aclose()


async def test_one_death_after_the_other() -> None:
    """What failed once is tried again after the request has moved on."""
    house = House("p1", "d1", "d2", "d3", max_attempts=9)
    stream, first = await decoding(house)
    house.kill(first)
    for _ in range(2):
        house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    second, attach = house.last_attach()
    assert attach.local
    house.says(second, token(stream.id, 3))
    house.kill(second)
    third, attach = house.last_attach()
    assert (attach.local, attach.request.forced) == (False, ((0, 1, 2, 3),))
    house.says("p1", token(stream.id, 4))
    house.reports(third, stream.id, Stage.ADOPTED)
    house.says(third, token(stream.id, 5, last=True))
    assert [out.token for out in await read_all(stream)] == [3, 4, 5]


async def test_adoption_told_by_the_prefill_worker_spares_a_redirect_to_nothing() -> None:
    """The decode worker has everything, and its word does not come through: the connection is silent, then broken."""
    house = House("p1", "d1", "d2")
    caches(house, "p1")
    stream = await house.start(PROMPT)
    first, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.reports("p1", stream.id, Stage.ADOPTED)
    house.kill(first)
    assert house.heard.remedies == [Remedy.RESUME]
    second, attach = house.last_attach()
    assert (second != first, attach.request.forced) == (True, ((0,),))
    assert house.last_prefill()[1].decode.worker == second
    house.says("p1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


# A decode worker that ends its try, and the prefill worker's news of it.


async def test_a_try_that_ended_at_the_decode_worker_waits_for_its_word() -> None:
    house = House("p1", "d1", "d2", verdict_s=5.0)
    stream = await house.start(PROMPT)
    first, _ = house.last_attach()
    house.rejects("p1", stream.id, RejectReason.STALE, held=True)
    assert house.heard.remedies == []
    house.rejects(first, stream.id, RejectReason.UNKNOWN)
    assert house.heard.remedies == [Remedy.REDIRECT]
    assert house.last_redirect()[1].generation == 2
    assert sum(isinstance(message, Prefill) for message in house.sent_to("p1")) == 1
    await stream.aclose()


async def test_a_decode_worker_that_does_not_say_why_it_ended_its_try() -> None:
    """It is the one that is given up, though it is the prefill worker that owes the first token."""
    house = House("p1", "d1", "d2", verdict_s=5.0)
    stream = await house.start(PROMPT)
    first, _ = house.last_attach()
    house.rejects("p1", stream.id, RejectReason.STALE, held=True)
    house.timers.advance(5.5)
    assert house.fleet.faults == [first]
    assert house.last_redirect()[1].decode.worker == house.last_attach()[0] != first
    assert house.aborts_to("p1") == []
    await stream.aclose()


@pytest.mark.parametrize("who_first", ["d1", "p1"])
@pytest.mark.parametrize("has_first", [True, False])
async def test_a_decode_worker_that_goes_on_alone_needs_no_prefill_worker(who_first: str, has_first: bool) -> None:
    """What came was damaged: it computes the prompt itself, and says every token that the client has not."""
    house = House("p1", "d1", "d2", verdict_s=5.0)
    house.kill("d2")
    stream = await house.start(PROMPT)
    house.reports("p1", stream.id, Stage.STREAMING)
    if has_first:
        house.says("p1", token(stream.id, 0))
    for name in sorted(["d1", "p1"], key=lambda name: name != who_first):
        if name == "d1":
            house.reports("d1", stream.id, Stage.QUEUED)
        else:
            house.rejects("p1", stream.id, RejectReason.STALE, held=True)
    assert house.aborts_to("p1") == [Abort(stream.id, Generation(1))]
    house.timers.advance(30.0)
    house.kill("p1")
    attached = [message.request.forced for message in house.sent_to("d1") if isinstance(message, Attach)]
    if has_first:
        # Left to itself it might draw another first token, and go on from that.
        assert attached == [(), ((0,),)]
        assert house.last_attach()[1].local
        house.says("d1", token(stream.id, 1, last=True), generation=2)
    else:
        assert attached == [()]
        assert house.heard.remedies == []
        house.says("d1", token(stream.id, 0), token(stream.id, 1, last=True))
    assert [out.token for out in await read_all(stream)] == [0, 1]


# There is an end to it.


def workers_of(house: House, request: RequestId) -> list[str]:
    """Those that have been sent its last try, the decode worker first."""
    mine = [(to, m) for to, m in house.fleet.sent if isinstance(m, Attach | Prefill) and m.request.id == request]
    newest = max(message.generation for _, message in mine)
    return [to for to, message in mine if message.generation == newest]


async def test_a_request_that_kills_its_workers_again_and_again_ends_and_the_others_go_on() -> None:
    """Both die each time, after another token or before it; others come."""
    house = House("p1", "d1", "d2", max_attempts=6)
    other = await house.start(PROMPT)
    house.says("p1", token(other.id, 0))
    killer = await house.start(PROMPT)
    number, has_told = 0, 0
    while house.flow.num_inflight == 2:
        number += 1
        assert number < 20
        decode, *prefills = workers_of(house, killer.id)
        if number % 2:
            house.says(decode, *(token(killer.id, position) for position in range(has_told + 1)))
            has_told += 1
        for role in Role:
            house.join(f"{role.value[0]}{number + 10}", role)
        for name in (decode, *prefills):
            house.kill(name)
    with pytest.raises(WorkerLost, match="given up after 6 attempts, the last in stage") as caught:
        await read_all(killer)
    assert caught.value.stage
    decode, *prefills = workers_of(house, other.id)
    house.says(decode, token(other.id, 0), token(other.id, 1, last=True))
    assert [out.token for out in await read_all(other)] == [0, 1]
    assert len(house.heard.ends) == 2
