"""The life of a request against scripted workers: exactly once, in order, and one end whatever comes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.control import Abort, Attach, Failed, FromRouter, Prefill, RejectReason, Renew, Role, Tokens, Welcome
from proto.errors import DeadlineExceeded, InvalidRequest, LocalFault, NoWorker, Overloaded, Unavailable
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import SamplingParams, TokenOut
from router.buffer import READ_S
from router.contract import NewRequest
from router.recovery import Remedy
from tests.support.fleet import House, read_all, token


async def test_a_pair_serves_a_request() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    (to_decode, attach), (to_prefill, prefill) = house.fleet.sent
    assert (to_decode, to_prefill) == ("d1", "p1")
    assert isinstance(attach, Attach)
    assert isinstance(prefill, Prefill)
    assert (attach.generation, attach.local, attach.positions) == (1, False, (0,))
    assert (prefill.generation, prefill.decode.worker, prefill.decode.address) == (1, "d1", "d1:1")
    assert prefill.request.seed == 7

    house.reports("p1", stream.id, Stage.QUEUED)
    house.reports("p1", stream.id, Stage.PREFILLING, num_cached=4)
    house.reports("p1", stream.id, Stage.STREAMING)
    house.says("p1", token(stream.id, 0))
    assert await anext(stream) == [token(stream.id, 0)]
    house.reports("d1", stream.id, Stage.ADOPTED, num_bytes=4096)
    house.says("d1", token(stream.id, 1))
    house.says("d1", token(stream.id, 2, last=True))
    assert await read_all(stream) == [token(stream.id, 1), token(stream.id, 2, last=True)]

    assert house.heard.stages() == [
        Stage.ROUTED,
        Stage.QUEUED,
        Stage.PREFILLING,
        Stage.STREAMING,
        Stage.SEALED,
        Stage.ADOPTED,
        Stage.DECODING,
        Stage.FINISHED,
    ]
    assert (stream.num_cached, stream.num_bytes_moved) == (4, 4096)
    assert (stream.prefill_worker, stream.decode_worker) == ("p1", "d1")
    assert house.flow.num_inflight == house.admission.num_inflight == 0
    assert not house.aborts_to("p1")
    assert not house.aborts_to("d1")
    await stream.aclose()
    assert [end.stage for end in house.heard.ends] == [Stage.FINISHED]


async def test_a_short_prompt_is_prefilled_on_the_decode_worker() -> None:
    house = House("p1", "d1", threshold=64)
    stream = await house.start()
    ((to, attach),) = house.fleet.sent
    assert to == "d1"
    assert isinstance(attach, Attach)
    assert attach.local
    house.says("d1", token(stream.id, 0), token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2
    assert house.heard.stages() == [Stage.ROUTED, Stage.QUEUED, Stage.PREFILLING, Stage.DECODING, Stage.FINISHED]
    assert (stream.prefill_worker, stream.decode_worker) == ("d1", "d1")


async def test_a_prefix_that_decode_holds_makes_a_long_prompt_local() -> None:
    house = House("p1", "d1", threshold=8)
    prompt = tuple(range(100))
    house.index.stored(Epoch("epoch-d1"), house.fleet.hasher().full_blocks(prompt[:96]))
    await house.start(prompt)
    assert house.last_attach()[1].local
    await house.start(range(500, 600))
    assert not house.last_attach()[1].local


async def test_without_prefill_workers_everything_is_local() -> None:
    house = House("d1")
    await house.start(range(1000))
    assert house.last_attach()[1].local


async def test_decode_may_be_heard_before_the_first_token() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("d1", token(stream.id, 1), token(stream.id, 2, last=True))
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not reader.done()
    house.says("p1", token(stream.id, 0))
    assert [out.position for out in await reader] == [0, 1, 2]


async def test_a_request_that_its_first_token_ends_is_withdrawn_everywhere() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0, last=True))
    assert len(await read_all(stream)) == 1
    assert house.aborts_to("d1") == house.aborts_to("p1") == [Abort(stream.id, Generation(1))]
    assert house.heard.stages()[-1] is Stage.FINISHED


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_interleaving_reads_the_same(data: st.DataObject) -> None:
    """First tokens come from P and the others from D, each stream in its own order, with repeats."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))

    async def run() -> None:
        house = House("p1", "d1")
        stream = await house.start(n=3)
        firsts = [token(stream.id, 0, choice=c, last=lengths[c] == 1) for c in range(3)]
        later = [
            token(stream.id, at, choice=c, last=at == lengths[c] - 1) for c in range(3) for at in range(1, lengths[c])
        ]
        from_prefill = data.draw(st.permutations(firsts))
        from_decode = sorted(data.draw(st.permutations(later)), key=lambda out: out.position)
        turns = data.draw(st.permutations(["p1"] * len(from_prefill) + ["d1"] * len(from_decode)))
        queues = {"p1": list(from_prefill), "d1": list(from_decode)}
        said: dict[str, list[TokenOut]] = {"p1": [], "d1": []}
        for name in turns:
            said[name].append(queues[name].pop(0))
            house.says(name, said[name][-1])
            if data.draw(st.booleans()):
                house.says(name, data.draw(st.sampled_from(said[name])))
        got = await read_all(stream)
        for choice in range(3):
            mine = [out for out in got if out.choice == choice]
            assert [out.position for out in mine] == list(range(lengths[choice]))
            assert [out.token for out in mine] == [1000 * choice + at for at in range(lengths[choice])]
        assert [end.stage for end in house.heard.ends] == [Stage.FINISHED]
        assert house.timers.num_live <= 1  # the renewal of leases, which finds nothing to renew

    asyncio.run(run())


async def test_leaving_frees_both_workers() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    await stream.aclose()
    await stream.aclose()
    assert house.aborts_to("p1") == house.aborts_to("d1") == [Abort(stream.id, Generation(1))]
    assert house.heard.stages()[-1] is Stage.ABORTED
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    house.says("d1", token(stream.id, 1))
    assert house.heard.refusals == ["unknown"]


async def test_stopping_one_choice_tells_decode_once_it_has_the_request() -> None:
    house = House("p1", "d1")
    stream = await house.start(n=2)
    house.says("p1", token(stream.id, 0, choice=0), token(stream.id, 0, choice=1))
    await anext(stream)
    stream.stop_choice(1)
    assert not house.aborts_to("d1")
    house.reports("d1", stream.id, Stage.ADOPTED)
    assert house.aborts_to("d1") == [Abort(stream.id, Generation(1), (1,))]
    house.says("d1", token(stream.id, 1, choice=1), token(stream.id, 1, choice=0))
    assert await anext(stream) == [token(stream.id, 1, choice=0)]
    stream.stop_choice(0)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert house.heard.stages()[-1] is Stage.FINISHED
    assert house.aborts_to("d1")[-1] == Abort(stream.id, Generation(1))


async def test_tokens_of_a_stopped_choice_that_were_not_read_are_dropped() -> None:
    house = House("p1", "d1")
    stream = await house.start(n=2)
    house.says("p1", token(stream.id, 0, choice=0), token(stream.id, 0, choice=1))
    stream.stop_choice(0)
    assert await anext(stream) == [token(stream.id, 0, choice=1)]


async def test_a_client_that_does_not_read_is_cut_off_and_others_go_on() -> None:
    house = House("p1", "d1", max_buffered_tokens=8)
    slow, other = await house.start(), await house.start()
    house.says("p1", token(slow.id, 0))
    house.says("d1", *(token(slow.id, at) for at in range(1, 20)))
    house.timers.advance(READ_S)
    house.says("p1", token(other.id, 0))
    assert await anext(other) == [token(other.id, 0)]
    with pytest.raises(Overloaded, match="not read in time"):
        await anext(slow)
    assert Abort(slow.id, Generation(1)) in house.aborts_to("d1")
    assert house.flow.num_inflight == 1


async def test_many_tokens_at_once_cut_off_nobody_who_reads() -> None:
    """A decode worker whose stream broke says again, in one go, what several choices have."""
    house = House("p1", "d1", max_buffered_tokens=8)
    stream = await house.start(n=4)
    house.says("p1", *(token(stream.id, 0, choice=choice) for choice in range(4)))
    for at in range(1, 31, 10):
        house.says("d1", *(token(stream.id, at + i, choice=choice) for choice in range(4) for i in range(10)))
        assert len(await anext(stream)) >= 40
        house.timers.advance(READ_S)
    house.says("d1", *(token(stream.id, 31, choice=choice, last=True) for choice in range(4)))
    assert len(await read_all(stream)) == 4
    assert house.timers.num_live <= 1


async def test_a_request_has_a_deadline_that_names_its_stage() -> None:
    house = House("p1", "d1", request_timeout_s=5.0)
    stream = await house.start()
    house.reports("p1", stream.id, Stage.PREFILLING)
    house.timers.advance(5.0)
    with pytest.raises(DeadlineExceeded) as caught:
        await anext(stream)
    assert caught.value.stage == "prefilling"
    assert house.aborts_to("p1")
    assert house.aborts_to("d1")
    assert house.flow.num_inflight == 0


async def test_the_deadline_counts_from_the_first_byte() -> None:
    house = House("p1", "d1", request_timeout_s=5.0)
    params = SamplingParams(max_tokens=4)
    stream = await house.flow.start(NewRequest(prompt=(1, 2, 3), params=params, spent_s=3.0))
    house.timers.advance(2.0)
    with pytest.raises(DeadlineExceeded, match="not finished within 5 s"):
        await anext(stream)


async def test_what_was_read_before_an_error_is_delivered_first() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    house.flow.message_came(Epoch("epoch-p1"), Failed(stream.id, Generation(1), 500, "x", "broken"))
    assert await anext(stream) == [token(stream.id, 0)]
    with pytest.raises(LocalFault, match="broken"):
        await anext(stream)


async def test_a_workers_verdict_on_the_request_reaches_the_client() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    house.flow.message_came(
        Epoch("epoch-p1"), Failed(stream.id, Generation(1), 400, "BadRequestError", "too long", "max_tokens")
    )
    with pytest.raises(InvalidRequest) as caught:
        await anext(stream)
    assert caught.value.param == "max_tokens"


async def test_leases_are_renewed_for_what_lives_where_it_lives() -> None:
    house = House("p1", "d1", lease_s=30.0)
    first, second = await house.start(), await house.start()
    house.reports("d1", second.id, Stage.ADOPTED)
    house.fleet.sent.clear()
    house.timers.advance(10.0)
    assert house.sent_to("p1") == [Renew((first.id,), 30.0)]
    assert house.sent_to("d1") == [Renew((first.id, second.id), 30.0)]
    await first.aclose()
    await second.aclose()
    house.timers.advance(10.0)
    assert house.timers.num_live == 0


async def test_a_worker_whose_stream_broke_is_told_what_is_still_wanted() -> None:
    house = House("p1", "d1", lease_s=30.0)
    first, second = await house.start(), await house.start()
    for stream in (first, second):
        house.says("p1", token(stream.id, 0))
    house.reports("d1", second.id, Stage.ADOPTED)
    house.fleet.sent.clear()
    house.blink("p1")
    assert house.sent_to("p1")[-1] == Renew((first.id,), 30.0)
    house.blink("d1")
    assert house.sent_to("d1")[-1] == Renew((first.id, second.id), 30.0)
    await first.aclose()
    await second.aclose()


async def test_the_door_is_bounded_and_reopens() -> None:
    house = House("p1", "d1", max_inflight=1)
    stream = await house.start()
    with pytest.raises(Overloaded) as caught:
        await house.start()
    assert caught.value.retry_after_s
    await stream.aclose()
    await house.start()


async def test_a_priority_is_refused_where_some_worker_serves_requests_as_they_come() -> None:
    house = House("p1", "d1", "d2")
    new = NewRequest(prompt=(1, 2, 3), params=SamplingParams(max_tokens=4), priority=-1)
    await (await house.flow.start(new)).aclose()
    house.fleet.sent.clear()
    d2 = house.fleet.workers[Epoch("epoch-d2")]
    house.fleet.workers[d2.epoch] = replace(d2, ignores_priority=True)
    with pytest.raises(InvalidRequest, match="must be 0") as caught:
        await house.flow.start(new)
    assert caught.value.param == "priority"
    assert house.heard.turned == [caught.value]
    assert not house.fleet.sent
    assert house.flow.num_inflight == house.admission.num_inflight == 0
    await (await house.flow.start(replace(new, priority=0))).aclose()
    await (await house.flow.start_canary(new)).aclose()
    house.fleet.workers[d2.epoch] = replace(d2, ignores_priority=True, is_usable=False)
    await (await house.flow.start(new)).aclose()


async def test_without_workers_nothing_is_left_behind() -> None:
    house = House()
    with pytest.raises(NoWorker):
        await house.start()
    assert house.flow.num_inflight == house.admission.num_inflight == house.timers.num_live == 0
    assert not house.heard.ends
    assert [type(error) for error in house.heard.turned] == [NoWorker]


@pytest.mark.parametrize("fails_at", [1, 2])
async def test_a_request_that_cannot_be_sent_leaves_nothing_behind(fails_at: int) -> None:
    house = House("p1", "d1")
    send, num_sent = house.fleet.send, 0

    def send_or_fail(epoch: Epoch, message: FromRouter) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == fails_at:
            raise ValueError("it cannot be encoded")
        send(epoch, message)

    house.fleet.send = send_or_fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="encoded"):
        await house.start()
    assert house.flow.num_inflight == house.admission.num_inflight == house.timers.num_live == 0
    assert [end.stage for end in house.heard.ends] == [Stage.FAILED]
    house.timers.advance(10_000.0)
    assert house.fleet.faults == []
    assert house.aborts_to("d1")
    await house.flow.drain(1.0)


async def test_draining_waits_for_those_inside_and_admits_nobody() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    draining = asyncio.ensure_future(house.flow.drain(60.0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await house.start()
    assert not draining.done()
    house.says("p1", token(stream.id, 0, last=True))
    await draining
    assert len(await read_all(stream)) == 1


async def test_closing_fails_what_is_left() -> None:
    house = House("p1", "d1")
    stream = await house.start()
    await house.flow.drain(0.0)
    with pytest.raises(Unavailable, match="shutting down"):
        await anext(stream)
    assert house.timers.num_live == 0


async def test_foreign_and_impossible_news_is_counted_and_not_applied() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    decode = house.last_attach()[0]
    other = {"d1": "d2", "d2": "d1"}[decode]
    house.says(other, token(stream.id, 0))
    house.says(decode, token(stream.id, 1), generation=9)
    house.flow.message_came(
        Epoch("epoch-p1"), Tokens(((RequestId("x.1"), Generation(1)),), (token(RequestId("x.1"), 0),))
    )
    house.flow.message_came(Epoch("epoch-p1"), Welcome(WorkerId("p1"), Epoch("epoch-p1"), Role.PREFILL, 1))
    house.says("p1", token(stream.id, 0, choice=5))
    assert house.heard.refusals == ["stale", "stale", "unknown", "malformed", "malformed"]
    assert house.heard.num_tokens == 0


async def test_news_of_a_try_that_was_given_up_is_counted() -> None:
    house = House("p1", "d1", "d2")
    stream = await house.start()
    house.rejects("p1", stream.id, RejectReason.REFUSED, held=True)
    assert house.last_redirect()[1].generation == 2
    house.rejects("p1", stream.id, RejectReason.PEER_LOST, held=True, generation=1)
    house.reports("p1", stream.id, Stage.ADOPTED, generation=1)
    assert house.heard.refusals == ["stale", "stale"]
    assert house.heard.remedies == [Remedy.REDIRECT]
    await stream.aclose()
