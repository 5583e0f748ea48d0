"""Both sessions over links within one process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvtransfer.fences import FenceTable, Refused
from kvtransfer.intake import PEER_LOST
from kvtransfer.session import ReceiveSession, Refusal, SendSession
from kvtransfer.states import ReceiveState, SendState
from kvtransfer.transport import Link, LinkLost
from kvtransfer.transports.memory import Faults, MemoryNetwork, pair
from proto.control import Peer
from proto.errors import LocalProtocolError
from proto.handoff import Ack, Adopted, Frame, Grant, HandoffMessage, Nack, Offer, Refuse, RefuseReason, Stale, Withdraw
from proto.ids import BlockId, Epoch, Generation, WorkerId
from proto.layout import KvLayout
from tests.support.handoff import CHOICES, LAYOUT, Ear, Store, Tier, make_fence, make_frame, make_offer, make_seal

BIG = KvLayout(num_layers=4, block_size=16, kv_heads=8, head_dim=64, dtype="float32", model_digest="big")


class Decode:
    """A decode worker of this process."""

    def __init__(
        self, network: MemoryNetwork, name: str = "d", layout: KvLayout = LAYOUT, num_blocks: int = 64
    ) -> None:
        self.tier = Tier(Store(num_blocks, layout))
        self.fences = FenceTable(Epoch(name), 100.0)
        self.peer = Peer(WorkerId(name), Epoch(name), name)
        self.sessions: list[ReceiveSession] = []
        self.has_session = asyncio.Event()
        self.faults: list[BaseException] = []
        network.serve(name, self.on_link)

    async def on_link(self, link: Link) -> None:
        session = ReceiveSession(link, self.tier.store, self.tier, self.fences)
        self.sessions.append(session)
        self.has_session.set()
        try:
            await session.run()
        except RuntimeError as fault:
            self.faults.append(fault)


@pytest.fixture
async def network() -> AsyncIterator[MemoryNetwork]:
    network = MemoryNetwork()
    yield network
    await network.drain()


def compute(session: SendSession, offer: Offer, store: Store) -> None:
    session.blocks_ready(0, store.fill(offer))
    session.seal(len(offer.hashes), make_seal(offer, layout=store.layout).num_tokens_last, CHOICES)


async def test_blocks_change_owner(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(3, num_tokens=10)
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    blocks = store.fill(offer)
    for index, block in enumerate(blocks):
        session.blocks_ready(index, [block])
    session.seal(3, 2, CHOICES)
    await running
    await network.drain()
    assert ear.told == ["granted", "adopted", "released"]
    assert decode.tier.told == ["reserve", "sealed", "adopted"]
    assert decode.tier.holds(offer)
    assert ear.num_bytes == decode.tier.num_bytes == 3 * LAYOUT.block_bytes
    assert session.state is SendState.RELEASED
    assert decode.sessions[0].state is ReceiveState.ADOPTED


async def test_only_what_is_missing_travels(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(5)
    decode.tier.num_present = 4
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    compute(session, offer, store)
    await session.run()
    assert decode.tier.num_bytes == LAYOUT.block_bytes
    assert decode.tier.holds(offer)


async def test_nothing_travels_where_everything_is_present(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(2)
    decode.tier.num_present = 2
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    compute(session, offer, store)
    await session.run()
    assert (ear.num_bytes, ear.told[-2:]) == (0, ["adopted", "released"])


async def test_large_blocks_move_in_threads(network: MemoryNetwork) -> None:
    decode = Decode(network, layout=BIG)
    ear, store, offer = Ear(), Store(40, BIG), make_offer(40, layout=BIG)
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    compute(session, offer, store)
    await session.run()
    assert decode.tier.holds(offer)
    assert ear.num_bytes == 40 * BIG.block_bytes


@pytest.mark.parametrize(
    "answer", [Refusal(RefuseReason.FULL, "no room", 1.5), RefuseReason.DRAINING, Refusal(RefuseReason.MISMATCH)]
)
async def test_refused_blocks_are_held_and_redirected(network: MemoryNetwork, answer: Refusal | RefuseReason) -> None:
    full, other = Decode(network, "full"), Decode(network, "other")
    full.tier.answer = answer
    ear, store, offer = Ear(), Store(8), make_offer(3, fence=make_fence(decode="full"))
    session = SendSession(offer, store, network.connect, full.peer, ear)
    running = asyncio.create_task(session.run())
    compute(session, offer, store)
    await ear.until("held")
    assert session.state is SendState.HELD
    assert ear.reasons[0][0] is (answer.reason if isinstance(answer, Refusal) else answer)
    assert session.retry_after_s == (answer.retry_after_s if isinstance(answer, Refusal) else None)
    assert session.redirect(Generation(2), other.peer)
    await running
    assert ear.told == ["held", "granted", "adopted", "released"]
    assert other.tier.holds(offer)
    assert full.tier.told == ["reserve"]


async def test_another_layout_is_refused_before_anything_is_asked(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(4, BIG), make_offer(2, layout=BIG)
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("held")
    assert ear.reasons[0][0] is RefuseReason.MISMATCH
    assert LAYOUT.describe() in ear.reasons[0][1]
    session.withdraw("no worker")
    await running
    assert decode.tier.told == []


async def test_no_transport_in_common(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(4), make_offer(2, transports=("carrier pigeon",))
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("held")
    assert ear.reasons[0][0] is RefuseReason.MISMATCH
    session.withdraw("no worker")
    await running
    assert ear.told == ["held", "released"]


async def test_redirect_in_mid_stream_serves_the_second_from_the_blocks_held(network: MemoryNetwork) -> None:
    first, second = Decode(network, "first"), Decode(network, "second")
    ear, store, offer = Ear(), Store(8), make_offer(4, fence=make_fence(decode="first"))
    session = SendSession(offer, store, network.connect, first.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    blocks = store.fill(offer)
    session.blocks_ready(0, blocks[:2])
    assert session.redirect(Generation(2), second.peer)
    session.blocks_ready(2, blocks[2:])
    session.seal(4, 4, CHOICES)
    await running
    await first.tier.is_over.wait()
    assert second.tier.holds(offer)
    assert first.tier.told == ["reserve", "freed"]
    assert second.tier.told == ["reserve", "sealed", "adopted"]
    assert not session.redirect(Generation(3), first.peer)


async def test_an_old_redirect_changes_nothing(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(2, fence=make_fence(5))
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    assert not session.redirect(Generation(5), decode.peer)
    compute(session, offer, store)
    await session.run()
    assert ear.told == ["granted", "adopted", "released"]


async def test_an_unreachable_decode_worker_is_a_lost_one(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(2)
    nobody = Peer(WorkerId("x"), Epoch("d"), "nowhere")
    session = SendSession(offer, store, network.connect, nobody, ear)
    running = asyncio.create_task(session.run())
    await ear.until("held")
    assert ear.reasons == [("peer_lost", "the link is lost")]
    compute(session, offer, store)
    session.redirect(Generation(2), decode.peer)
    await running
    assert ear.told == ["held", "granted", "adopted", "released"]


async def test_a_lost_decode_worker_leaves_the_blocks_held(network: MemoryNetwork) -> None:
    ours, theirs = pair()

    async def connect(peer: Peer) -> Link:
        return ours if peer.address == "d" else await network.connect(peer)

    ear, store, offer = Ear(), Store(8), make_offer(2)
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    compute(session, offer, store)
    running = asyncio.create_task(session.run())
    assert isinstance(await theirs.receive(), Offer)
    await theirs.send(Grant(offer.fence, 0, "memory"))
    assert isinstance(await theirs.receive(), Frame)
    await theirs.close()
    await ear.until("held")
    decode = Decode(network, "other")
    session.redirect(Generation(2), decode.peer)
    await running
    assert decode.tier.holds(offer)


async def test_an_error_of_ours_ends_the_session_instead_of_blaming_decode_workers() -> None:
    def no_memory(message: HandoffMessage) -> list[HandoffMessage]:
        if isinstance(message, Frame):
            raise MemoryError
        return [message]

    ours, theirs = pair(forth=no_memory)

    async def connect(peer: Peer) -> Link:
        return ours

    ear, store, offer = Ear(), Store(8), make_offer(2)
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    compute(session, offer, store)
    running = asyncio.create_task(session.run())
    assert isinstance(await theirs.receive(), Offer)
    await theirs.send(Grant(offer.fence, 0, "memory"))
    with pytest.raises(MemoryError):
        await running
    assert ear.told == ["granted", "released"]
    assert not session.redirect(Generation(2), Peer(WorkerId("other"), Epoch("other"), "other"))


async def test_an_incarnation_that_is_not_meant_counts_as_lost(network: MemoryNetwork) -> None:
    decode, ear, store = Decode(network), Ear(), Store(8)
    offer = make_offer(2, fence=make_fence(decode="the one before"))
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("held")
    assert ear.reasons[0][0] == "peer_lost"
    assert decode.fences.refusals[Refused.FOREIGN_EPOCH] == 1
    session.withdraw("done")
    await running
    assert decode.tier.told == []


async def test_withdraw_frees_the_decode_side(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(4)
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    session.blocks_ready(0, store.fill(offer)[:2])
    session.withdraw("finished at its first token")
    await running
    await decode.tier.is_over.wait()
    assert decode.tier.told == ["reserve", "freed"]
    assert "finished at its first token" in decode.tier.freed_with[0][1]
    assert ear.told[-1] == "released"
    # News that was on its way when the blocks were let go is no error.
    session.blocks_ready(2, [BlockId(2)])
    session.seal(4, 4, CHOICES)
    session.renew(5.0)
    session.withdraw("again")
    assert ear.told.count("released") == 1


async def test_the_lease_ends_by_itself() -> None:
    network, ear, store = MemoryNetwork(), Ear(), Store(4)
    now = 0.0
    offer = make_offer(1, lease_s=10.0)
    session = SendSession(
        offer, store, network.connect, Peer(WorkerId("x"), Epoch("d"), "nowhere"), ear, clock=lambda: now
    )
    running = asyncio.create_task(session.run())
    await ear.until("held")
    session.renew(20.0)
    now = 15.0
    session.renew(20.0)
    assert not running.done()
    now = 36.0
    session.renew(-1.0)
    await running
    assert ear.told == ["held", "released"]


async def test_a_cancelled_sender_releases(network: MemoryNetwork) -> None:
    decode, ear, store, offer = Decode(network), Ear(), Store(8), make_offer(4)
    session = SendSession(offer, store, network.connect, decode.peer, ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ear.told == ["granted", "released"]
    await decode.tier.is_over.wait()
    assert decode.tier.told == ["reserve", "freed"]


async def test_a_cancelled_receiver_frees_and_the_sender_holds(network: MemoryNetwork) -> None:
    tier, fences = Tier(Store(8)), FenceTable(Epoch("d"), 100.0)
    serving: list[asyncio.Task[None]] = []

    async def on_link(link: Link) -> None:
        serving.append(asyncio.create_task(ReceiveSession(link, tier.store, tier, fences).run()))
        await asyncio.wait(serving)

    network.serve("d", on_link)
    ear, store, offer = Ear(), Store(8), make_offer(4)
    session = SendSession(offer, store, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    serving[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving[0]
    assert tier.told == ["reserve", "freed"]
    await ear.until("held")
    session.withdraw("done")
    await running


class Script:
    """A prefill worker played by hand, against a real ReceiveSession."""

    def __init__(self, *, num_present: int = 0, **options: object) -> None:
        self.link, theirs = pair(64)
        self.tier = Tier(Store(8), num_present=num_present)
        self.fences = FenceTable(Epoch("d"), 100.0)
        self.session = ReceiveSession(theirs, self.tier.store, self.tier, self.fences)
        self.running = asyncio.create_task(self.session.run())

    async def say(self, *messages: HandoffMessage) -> None:
        for message in messages:
            await self.link.send(message)

    async def begin(self, offer: Offer) -> None:
        await self.say(offer)
        if self.tier.fault_in != "reserve":
            await self.hear(Grant)

    async def hear(self, kind: type[HandoffMessage]) -> HandoffMessage:
        while not isinstance(message := await self.link.receive(), kind):
            pass
        return message


async def test_a_lost_prefill_worker_before_the_seal_frees() -> None:
    script, offer = Script(), make_offer(3)
    await script.begin(offer)
    await script.say(make_frame(offer, 0))
    assert await script.hear(Ack) == Ack(offer.fence, 1)
    await script.link.close()
    await script.running
    assert script.tier.told == ["reserve", "freed"]
    assert script.tier.freed_with == [(1, "peer_lost")]


async def test_a_lost_prefill_worker_after_seal_and_blocks_changes_nothing() -> None:
    script, offer = Script(), make_offer(2)
    await script.begin(offer)
    await script.say(make_frame(offer, 1), make_seal(offer), make_frame(offer, 0))
    await script.link._outgoing.close(lose=False)  # it dies: what it sent still arrives
    await script.running
    assert script.tier.told == ["reserve", "sealed", "adopted"]
    assert script.tier.holds(offer)


async def test_a_lost_prefill_worker_after_the_seal_with_a_block_missing_frees() -> None:
    script, offer = Script(), make_offer(3)
    await script.begin(offer)
    await script.say(make_frame(offer, 0), make_frame(offer, 2), make_seal(offer))
    await script.link._outgoing.close(lose=False)
    await script.running
    assert script.tier.told == ["reserve", "sealed", "freed"]
    assert script.tier.freed_with == [(1, "peer_lost")]


async def test_a_damaged_block_is_fetched_again() -> None:
    script, offer = Script(), make_offer(2)
    wrong = make_frame(offer, 1, payload=bytes(LAYOUT.block_bytes))
    await script.begin(offer)
    await script.say(make_frame(offer, 0), wrong, make_seal(offer))
    nack = await script.hear(Nack)
    assert nack == Nack(offer.fence, 1)
    await script.say(make_frame(offer, 1))
    await script.hear(Adopted)
    await script.link.close()
    await script.running
    assert script.tier.holds(offer)
    assert script.fences.refusals.num_damaged == 1


async def test_a_block_that_stays_damaged_is_recomputed_by_the_decode_worker() -> None:
    script, offer = Script(), make_offer(3)
    wrong = make_frame(offer, 1, payload=bytes(LAYOUT.block_bytes))
    await script.begin(offer)
    await script.say(make_frame(offer, 0), wrong)
    for _ in range(2):
        await script.hear(Nack)
        await script.say(wrong)
    # P need send no more: this try goes on without it.
    assert await script.hear(Stale) == Stale(offer.fence, offer.fence.generation)
    await script.running
    assert script.tier.freed_with == [(1, "corrupt")]


async def test_the_right_bytes_of_another_block_are_damage_too() -> None:
    script, offer = Script(), make_offer(2)
    other = make_frame(offer, 0)
    await script.begin(offer)
    await script.say(replace(other, index=1))
    assert await script.hear(Nack) == Nack(offer.fence, 1)
    await script.link.close()
    await script.running


async def test_a_verified_block_is_never_written_again() -> None:
    script, offer = Script(), make_offer(1)
    await script.begin(offer)
    await script.say(make_frame(offer, 0))
    await script.hear(Ack)
    await script.say(make_frame(offer, 0, payload=bytes(LAYOUT.block_bytes)), make_frame(offer, 0))
    await script.hear(Ack)
    await script.say(make_seal(offer))
    await script.hear(Adopted)
    await script.link.close()
    await script.running
    assert script.tier.store.writes == {0: 1}
    assert script.tier.holds(offer)


async def test_a_newer_try_frees_the_older_one_of_the_same_worker() -> None:
    script, offer = Script(), make_offer(3)
    await script.begin(offer)
    newer = make_offer(3, fence=make_fence(2))
    link, theirs = pair()
    tier = Tier(script.tier.store, first_block=4)
    running = asyncio.create_task(ReceiveSession(theirs, tier.store, tier, script.fences).run())
    await link.send(newer)
    assert isinstance(await link.receive(), Grant)
    assert await script.hear(Stale) == Stale(offer.fence, Generation(2))
    await script.running
    assert script.tier.freed_with == [(0, "superseded")]
    # The older try's frames come too late for the new one.
    await link.send(make_frame(offer, 0))
    assert await link.receive() == Stale(offer.fence, Generation(2))
    await link.close()
    await running
    assert script.fences.refusals[Refused.STALE_GENERATION] == 1


async def test_a_duplicate_of_a_finished_try_revives_nothing() -> None:
    script, offer = Script(), make_offer(1)
    await script.begin(offer)
    await script.say(make_frame(offer, 0), make_seal(offer))
    await script.hear(Adopted)
    await script.link.close()
    await script.running
    link, theirs = pair()
    tier = Tier(Store(8))
    running = asyncio.create_task(ReceiveSession(theirs, tier.store, tier, script.fences).run())
    await link.send(offer)
    assert await link.receive() == Stale(offer.fence, Generation(1))
    await link.close()
    await running
    assert tier.told == []


async def test_the_routers_abort_ends_a_try_and_bars_it() -> None:
    script, offer = Script(), make_offer(2)
    await script.begin(offer)
    script.fences.end(offer.fence.request, Generation(1), 0.0)
    assert isinstance(await script.hear(Stale), Stale)
    await script.running
    assert script.tier.freed_with == [(0, "superseded")]


async def test_a_withdraw_after_adoption_takes_the_request_back() -> None:
    script, offer = Script(), make_offer(1)
    await script.begin(offer)
    await script.say(make_frame(offer, 0), make_seal(offer))
    await script.hear(Adopted)
    await script.say(Withdraw(offer.fence, "redirected"))
    await script.running
    assert script.tier.told == ["reserve", "sealed", "adopted", "freed"]


async def test_a_withdraw_during_adoption_comes_behind_it() -> None:
    script, offer = Script(), make_offer(1)
    script.tier.may_adopt = asyncio.Event()
    await script.begin(offer)
    await script.say(make_frame(offer, 0), make_seal(offer))
    await script.hear(Ack)
    await script.say(Withdraw(offer.fence, "aborted"), make_frame(make_offer(1, fence=make_fence(request="r.2")), 0))
    await script.hear(Stale)  # so the Withdraw before it has been read
    assert script.tier.told == ["reserve", "sealed"]
    script.tier.may_adopt.set()
    await script.running
    assert script.tier.told == ["reserve", "sealed", "adopted", "freed"]


@pytest.mark.parametrize("where", ["reserve", "sealed", "adopted"])
async def test_a_failing_tier_gives_everything_back(where: str) -> None:
    script, offer = Script(), make_offer(1)
    script.tier.fault_in = where
    await script.begin(offer)
    if where != "reserve":
        await script.say(make_frame(offer, 0), make_seal(offer))
    refusal = await script.hear(Refuse)
    assert isinstance(refusal, Refuse)
    with pytest.raises(RuntimeError, match=where):
        await script.running
    assert script.tier.told[-1] == ("reserve" if where == "reserve" else "freed")


async def test_a_failing_memory_gives_everything_back() -> None:
    script, offer = Script(), make_offer(1)

    def broken(block: BlockId, data: bytes | memoryview) -> None:
        raise OSError("device lost")

    script.tier.store.write = broken  # type: ignore[method-assign]
    await script.begin(offer)
    await script.say(make_frame(offer, 0))
    await script.hear(Refuse)
    with pytest.raises(OSError, match="device lost"):
        await script.running
    assert script.tier.told == ["reserve", "freed"]


async def test_a_peer_that_breaks_the_contract_is_lost() -> None:
    script, offer = Script(), make_offer(2)
    await script.begin(offer)
    await script.say(replace(make_frame(offer, 0), index=9))
    await script.running
    assert script.tier.freed_with == [(0, "peer_lost")]
    assert script.fences.refusals[Refused.MALFORMED] == 1
    with pytest.raises(LinkLost):
        await script.hear(Stale)


async def test_a_decode_worker_that_breaks_the_contract_is_lost_too() -> None:
    ours, theirs = pair()

    async def connect(peer: Peer) -> Link:
        return ours

    ear = Ear()
    session = SendSession(make_offer(2), Store(4), connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    running = asyncio.create_task(session.run())
    offer = await theirs.receive()
    await theirs.send(Ack(offer.fence, 2))  # of blocks that were not sent
    await ear.until("held")
    assert ear.reasons[0][0] == PEER_LOST
    assert session.refusals[Refused.MALFORMED] == 1
    session.withdraw("nobody else is there")
    await running


async def test_our_own_disorder_is_our_own_error() -> None:
    network = MemoryNetwork()
    session = SendSession(make_offer(2), Store(4), network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), Ear())
    with pytest.raises(LocalProtocolError):
        session.blocks_ready(1, [BlockId(1)])
    session.blocks_ready(0, [BlockId(0)])
    with pytest.raises(LocalProtocolError):
        session.seal(2, 1, CHOICES)


@pytest.mark.parametrize("seed", range(12))
async def test_a_bad_link_ends_well(seed: int) -> None:
    """Both sessions over a link that loses, repeats, delays and damages, until it is healed."""
    rng = random.Random(seed)
    chances = {"drop": 0.25, "duplicate": 0.2, "delay": 0.25, "corrupt": 0.1}
    forth, back = Faults(rng, **chances), Faults(rng, **chances)
    ours, theirs = pair(64, forth=forth, back=back)

    async def connect(peer: Peer) -> Link:
        return ours

    tier, fences, store, ear = Tier(Store(16)), FenceTable(Epoch("d"), 100.0), Store(16), Ear()
    offer = make_offer(10)
    receiving = asyncio.create_task(ReceiveSession(theirs, tier.store, tier, fences).run())
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear, rto_s=0.005)
    compute(session, offer, store)
    running = asyncio.create_task(session.run())
    await asyncio.wait({running}, timeout=0.1)
    forth.heal()
    back.heal()
    held = asyncio.create_task(ear.until("held"))
    await asyncio.wait({running, held}, return_when=asyncio.FIRST_COMPLETED)
    held.cancel()
    session.withdraw("nobody else is there")  # where D went its own way, and its last word was lost
    await running
    await receiving
    assert ear.told[-1] == "released"
    assert len(tier.told) == len(set(tier.told))
    if "adopted" in tier.told:
        assert tier.holds(offer)
    else:
        assert tier.freed_with[0][1] == "corrupt"
