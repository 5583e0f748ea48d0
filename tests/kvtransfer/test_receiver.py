"""D's half: what it takes, what it refuses, and that a reservation ends exactly once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvtransfer.fences import FenceTable, Refused
from kvtransfer.receiver import Ask, Freed, Receiver, Sealed, Verified
from kvtransfer.states import ReceiveState
from proto.errors import RemoteProtocolError
from proto.handoff import (
    Ack,
    Adopted,
    Frame,
    Grant,
    HandoffMessage,
    Located,
    Nack,
    Offer,
    Refuse,
    RefuseReason,
    SealedChoice,
    Stale,
    Withdraw,
)
from proto.ids import BlockHash, Epoch, Generation
from tests.support.handoff import BLOCK, LAYOUT, make_fence, make_frame, make_offer, make_seal

OFFER = make_offer(3, num_tokens=10)
FENCE = OFFER.fence
SEAL = make_seal(OFFER)
FRAMES = [make_frame(OFFER, index) for index in range(3)]


def make(fences: FenceTable | None = None) -> Receiver:
    return Receiver(LAYOUT, fences or FenceTable(Epoch("d"), 100.0), 0.0)


def outputs(receiver: Receiver) -> list[HandoffMessage]:
    said: list[HandoffMessage] = []
    while (message := receiver.next_output()) is not None:
        said.append(message)
    return said


def reserved(num_present: int = 0, *, offer: Offer = OFFER, fences: FenceTable | None = None) -> Receiver:
    receiver = make(fences)
    receiver.receive(offer, 0.0)
    assert receiver.take_notices() == [Ask(offer)]
    receiver.reserved(num_present, "memory", 0.0)
    assert outputs(receiver) == [Grant(offer.fence, num_present, "memory")]
    return receiver


def place(receiver: Receiver, *indices: int, is_right: bool = True) -> None:
    for index in indices:
        receiver.receive(FRAMES[index], 0.0)
        assert [frame.index for frame in receiver.take_frames(10)] == [index]
        receiver.placed(index, is_right)


def verified(num_present: int = 0, fences: FenceTable | None = None) -> Receiver:
    receiver = reserved(num_present, fences=fences)
    place(receiver, *range(num_present, 3))
    receiver.receive(SEAL, 0.0)
    assert receiver.take_notices() == [Sealed(SEAL), Verified(SEAL)]
    outputs(receiver)
    return receiver


def adopted(fences: FenceTable | None = None) -> Receiver:
    receiver = verified(fences=fences)
    receiver.adopted()
    assert outputs(receiver) == [Adopted(FENCE)]
    return receiver


class TestTaking:
    def test_blocks_are_taken_in_any_order(self) -> None:
        receiver = reserved()
        place(receiver, 2)
        assert outputs(receiver) == [Ack(FENCE, 0)]
        place(receiver, 0, 1)
        assert outputs(receiver) == [Ack(FENCE, 3)]  # one for all of them
        assert receiver.state is ReceiveState.RECEIVING

    def test_nothing_is_adopted_before_the_last_block_is_verified(self) -> None:
        receiver = reserved()
        receiver.receive(SEAL, 0.0)
        assert receiver.take_notices() == [Sealed(SEAL)]
        place(receiver, 0, 1)
        receiver.receive(FRAMES[2], 0.0)
        receiver.take_frames(10)
        assert receiver.take_notices() == []
        receiver.placed(2, True)
        assert receiver.take_notices() == [Verified(SEAL)]
        assert receiver.state is ReceiveState.VERIFIED
        assert Adopted(FENCE) not in outputs(receiver)
        receiver.adopted()
        assert outputs(receiver) == [Adopted(FENCE)]

    def test_where_everything_is_present_the_seal_is_enough(self) -> None:
        receiver = reserved(num_present=3)
        receiver.receive(SEAL, 0.0)
        assert receiver.take_notices() == [Sealed(SEAL), Verified(SEAL)]

    def test_what_is_repeated_is_answered_and_not_applied_again(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = reserved(fences=fences)
        receiver.receive(OFFER, 0.0)
        assert outputs(receiver) == [Grant(FENCE, 0, "memory")]
        receiver.receive(FRAMES[0], 0.0)
        receiver.receive(FRAMES[0], 0.0)
        assert len(receiver.take_frames(10)) == 1
        receiver.receive(FRAMES[0], 0.0)
        assert receiver.take_frames(10) == []
        receiver.placed(0, True)
        outputs(receiver)
        receiver.receive(FRAMES[0], 0.0)
        assert receiver.take_frames(10) == []
        assert outputs(receiver) == [Ack(FENCE, 1)]
        assert fences.refusals[Refused.DUPLICATE] == 3
        place(receiver, 1, 2)
        receiver.receive(SEAL, 0.0)
        receiver.receive(SEAL, 0.0)
        assert receiver.take_notices() == [Sealed(SEAL), Verified(SEAL)]

    @pytest.mark.parametrize("message", [OFFER, SEAL, FRAMES[1]])
    def test_once_adopted_any_repeat_is_answered_so(self, message: HandoffMessage) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = adopted(fences)
        receiver.receive(message, 0.0)
        assert outputs(receiver) == [Adopted(FENCE)]
        assert fences.refusals[Refused.DUPLICATE] == isinstance(message, Frame), "a late write into what has an owner"
        assert receiver.take_notices() == []

    def test_an_offer_repeated_while_we_ask_is_not_asked_again(self) -> None:
        receiver = make()
        receiver.receive(OFFER, 0.0)
        receiver.receive(OFFER, 0.0)
        assert receiver.take_notices() == [Ask(OFFER)]
        assert outputs(receiver) == []

    def test_frames_are_taken_a_few_at_a_time(self) -> None:
        receiver = reserved()
        for frame in FRAMES:
            receiver.receive(frame, 0.0)
        assert [len(receiver.take_frames(2)) for _ in range(3)] == [2, 1, 0]


class TestDamage:
    def test_a_damaged_block_is_asked_for_again_twice(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = reserved(fences=fences)
        place(receiver, 0)
        outputs(receiver)
        for _ in range(2):
            place(receiver, 1, is_right=False)
            assert outputs(receiver) == [Nack(FENCE, 1)]
        place(receiver, 1)
        assert outputs(receiver) == [Ack(FENCE, 2)]
        assert fences.refusals.num_damaged == 2

    def test_then_d_goes_on_alone_and_p_lets_go(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = reserved(fences=fences)
        place(receiver, 0, 2)
        for _ in range(2):
            place(receiver, 1, is_right=False)
        outputs(receiver)
        place(receiver, 1, is_right=False)
        assert receiver.take_notices() == [Freed(1, "corrupt")]
        assert outputs(receiver) == [Stale(FENCE, FENCE.generation)]
        assert fences.refusals.num_damaged == 3
        receiver.receive(FRAMES[1], 0.0)  # P has not heard it yet
        assert receiver.take_frames(10) == []
        assert outputs(receiver) == [Stale(FENCE, FENCE.generation)]
        receiver.receive(Withdraw(FENCE, "heard"), 0.0)
        assert (fences.refusals[Refused.LATE], fences.refusals.total) == (1, 1)

    def test_damage_is_counted_by_block(self) -> None:
        receiver = reserved()
        for index in (0, 1, 2, 0, 1, 2):
            place(receiver, index, is_right=False)
        place(receiver, 0, 1, 2)
        assert receiver.state is ReceiveState.RECEIVING


class TestRefusing:
    def test_no_room(self) -> None:
        receiver = make()
        receiver.receive(OFFER, 0.0)
        receiver.refused(RefuseReason.FULL, "no room", 1.5)
        assert outputs(receiver) == [Refuse(FENCE, RefuseReason.FULL, "no room", 1.5)]
        assert receiver.is_over
        receiver.receive(OFFER, 0.0)
        assert outputs(receiver) == [Refuse(FENCE, RefuseReason.FULL, "no room", 1.5)]
        assert receiver.take_notices() == [Ask(OFFER)]

    def test_another_layout(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = make(fences)
        receiver.receive(replace(OFFER, layout="another", layout_text="of 9 layers"), 0.0)
        (refusal,) = outputs(receiver)
        assert isinstance(refusal, Refuse)
        assert refusal.reason is RefuseReason.MISMATCH
        assert "of 9 layers" in refusal.message
        assert receiver.take_notices() == []
        assert fences.num_known == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"num_tokens": 0},
            {"num_tokens": 8},
            {"num_tokens": 13},
            {"num_choices": 0},
            {"lease_s": 0.0},
            {"hashes": (*OFFER.hashes, BlockHash(bytes(16)))},
        ],
    )
    def test_an_offer_that_makes_no_sense(self, change: dict[str, object]) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        with pytest.raises(RemoteProtocolError):
            make(fences).receive(replace(OFFER, **change), 0.0)  # type: ignore[arg-type]
        assert fences.num_known == 0

    @pytest.mark.parametrize(
        "message",
        [
            make_frame(make_offer(4), 3),
            replace(FRAMES[1], index=0),
            replace(FRAMES[1], payload=bytes(BLOCK - 1)),
            replace(SEAL, num_blocks=2),
            replace(SEAL, num_tokens_last=3),
            replace(SEAL, choices=()),
            Grant(FENCE, 0, "memory"),
            Ack(FENCE, 0),
            Adopted(FENCE),
        ],
    )
    def test_messages_that_make_no_sense_change_nothing(self, message: HandoffMessage) -> None:
        receiver = reserved(num_present=1)
        with pytest.raises(RemoteProtocolError):
            receiver.receive(message, 0.0)
        assert receiver.state is ReceiveState.RESERVED
        assert (receiver.take_frames(10), receiver.take_notices()) == ([], [])

    def test_two_seals_that_differ(self) -> None:
        receiver = reserved()
        receiver.receive(SEAL, 0.0)
        with pytest.raises(RemoteProtocolError):
            receiver.receive(replace(SEAL, choices=(SealedChoice(8),)), 0.0)

    def test_a_place_is_a_payload_too(self) -> None:
        receiver = reserved()
        receiver.receive(replace(FRAMES[0], payload=Located(64)), 0.0)
        assert len(receiver.take_frames(10)) == 1

    def test_blocks_before_the_grant(self) -> None:
        receiver = make()
        receiver.receive(OFFER, 0.0)
        with pytest.raises(RemoteProtocolError):
            receiver.receive(FRAMES[0], 0.0)


class TestFences:
    @pytest.mark.parametrize(
        ("fence", "reason"),
        [
            (make_fence(1), Refused.STALE_GENERATION),
            (make_fence(2, decode="d before"), Refused.FOREIGN_EPOCH),
            (make_fence(2, prefill="p before"), Refused.FOREIGN_EPOCH),
            (make_fence(2, request="r.9"), Refused.UNKNOWN),
        ],
    )
    def test_another_fence_changes_nothing(self, fence, reason) -> None:  # type: ignore[no-untyped-def]
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = reserved(offer=make_offer(3, fence=make_fence(2)), fences=fences)
        highest = fences.highest(fence.request)
        for message in (replace(FRAMES[0], fence=fence), Withdraw(fence), replace(SEAL, fence=fence)):
            receiver.receive(message, 1.0)
            assert outputs(receiver) == [Stale(fence, highest)]
        receiver.receive(Stale(fence, Generation(9)), 1.0)
        assert outputs(receiver) == []
        assert (receiver.state, receiver.take_frames(10)) == (ReceiveState.RESERVED, [])
        assert (fences.refusals[reason], fences.refusals.total) == (4, 4)
        assert receiver.deadline() == 30.0  # a stranger does not keep the lease alive

    def test_an_offer_to_another_incarnation(self) -> None:
        fences = FenceTable(Epoch("d after"), 100.0)
        receiver = make(fences)
        receiver.receive(OFFER, 0.0)
        assert outputs(receiver) == [Stale(FENCE, Generation(0))]
        assert receiver.take_notices() == []

    def test_blocks_of_an_unknown_request(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        receiver = make(fences)
        receiver.receive(FRAMES[0], 0.0)
        assert outputs(receiver) == [Stale(FENCE, Generation(0))]
        assert fences.refusals[Refused.UNKNOWN] == 1

    def test_blocks_of_a_try_that_is_over(self) -> None:
        fences = FenceTable(Epoch("d"), 100.0)
        old = reserved(fences=fences)
        old.abort("done")
        old.close(0.0)
        receiver = make(fences)
        receiver.receive(FRAMES[0], 0.0)
        receiver.receive(OFFER, 0.0)
        assert outputs(receiver) == [Stale(FENCE, Generation(1))] * 2
        assert fences.refusals[Refused.STALE_GENERATION] == 2

    def test_a_withdraw_that_overtakes_its_offer(self) -> None:
        receiver = make()
        receiver.receive(Withdraw(FENCE, "aborted"), 0.0)
        receiver.receive(OFFER, 0.0)
        assert receiver.take_notices() == []
        assert outputs(receiver) == [Stale(FENCE, Generation(1))]

    def test_a_newer_try_frees_the_older(self) -> None:
        fences, told = FenceTable(Epoch("d"), 100.0), []
        older = Receiver(LAYOUT, fences, 0.0, on_superseded=lambda: told.append(True))
        older.receive(OFFER, 0.0)
        older.reserved(0, "memory", 0.0)
        outputs(older)
        older.take_notices()
        reserved(offer=make_offer(3, fence=make_fence(2)), fences=fences)
        assert told == [True]
        assert older.take_notices() == [Freed(0, "superseded")]
        assert outputs(older) == [Stale(FENCE, Generation(2))]


class TestFreeing:
    def test_a_withdraw_frees_what_is_not_verified(self) -> None:
        receiver = reserved(num_present=1)
        place(receiver, 1)
        receiver.receive(Withdraw(FENCE, "aborted"), 0.0)
        assert receiver.take_notices() == [Freed(2, "withdrawn: aborted")]
        assert receiver.is_over

    def test_nothing_is_freed_while_a_copy_runs(self) -> None:
        receiver = reserved()
        for frame in FRAMES:
            receiver.receive(frame, 0.0)
        receiver.take_frames(2)
        receiver.receive(Withdraw(FENCE), 0.0)
        assert receiver.take_frames(2) == []
        receiver.placed(0, True)
        assert receiver.take_notices() == []
        assert not receiver.is_over
        receiver.placed(1, False)
        assert receiver.take_notices() == [Freed(0, "withdrawn: ")]
        assert outputs(receiver) == []
        assert receiver.is_over

    def test_a_reservation_that_comes_too_late_goes_back(self) -> None:
        receiver = make()
        receiver.receive(OFFER, 0.0)
        receiver.take_notices()
        receiver.lost()
        assert receiver.take_notices() == []
        assert not receiver.is_over
        receiver.reserved(2, "memory", 0.0)
        assert receiver.take_notices() == [Freed(2, "peer_lost")]
        assert outputs(receiver) == []

    def test_a_refusal_that_comes_too_late_is_nothing(self) -> None:
        receiver = make()
        receiver.receive(OFFER, 0.0)
        receiver.receive(Withdraw(FENCE), 0.0)
        receiver.refused(RefuseReason.FULL)
        assert (outputs(receiver), receiver.is_over) == ([], True)

    @pytest.mark.parametrize("num_placed", [0, 1])
    def test_p_lost_before_its_seal(self, num_placed: int) -> None:
        receiver = reserved()
        place(receiver, *range(num_placed))
        receiver.lost()
        receiver.lost()
        assert receiver.take_notices() == [Freed(num_placed, "peer_lost")]

    def test_p_lost_after_its_seal_with_every_block_here(self) -> None:
        receiver = reserved()
        for frame in FRAMES:
            receiver.receive(frame, 0.0)
        receiver.receive(SEAL, 0.0)
        receiver.take_frames(1)
        receiver.lost()
        receiver.placed(0, True)
        for frame in receiver.take_frames(10):
            receiver.placed(frame.index, True)
        assert receiver.take_notices() == [Sealed(SEAL), Verified(SEAL)]

    def test_p_lost_after_its_seal_with_a_block_missing(self) -> None:
        receiver = reserved()
        place(receiver, 0)
        receiver.receive(FRAMES[2], 0.0)
        receiver.receive(SEAL, 0.0)
        receiver.lost()
        assert receiver.take_notices() == [Sealed(SEAL)]
        receiver.take_frames(10)
        receiver.placed(2, True)
        assert receiver.take_notices() == [Freed(1, "peer_lost")]

    def test_p_lost_with_a_block_to_be_fetched_again(self) -> None:
        receiver = reserved()
        place(receiver, 0, 1)
        receiver.receive(FRAMES[2], 0.0)
        receiver.receive(SEAL, 0.0)
        receiver.take_frames(10)
        receiver.lost()
        receiver.placed(2, False)
        assert receiver.take_notices() == [Sealed(SEAL), Freed(2, "peer_lost")]

    def test_the_lease_is_kept_by_p(self) -> None:
        receiver = reserved()
        receiver.receive(FRAMES[0], 20.0)
        receiver.tick(49.0)
        assert receiver.state is ReceiveState.RECEIVING
        receiver.tick(50.0)
        assert receiver.take_notices() == [Freed(0, "the lease has ended")]
        (refusal,) = outputs(receiver)
        assert isinstance(refusal, Refuse)

    def test_the_lease_is_kept_by_the_router(self) -> None:
        receiver = reserved()
        receiver.renew(60.0, 10.0)
        assert receiver.deadline() == 70.0

    def test_a_repeated_offer_brings_a_new_lease(self) -> None:
        receiver = reserved()
        receiver.receive(replace(OFFER, lease_s=90.0), 5.0)
        assert receiver.deadline() == 95.0

    def test_a_link_without_an_offer_is_not_waited_for(self) -> None:
        receiver = make()
        receiver.tick(30.0)
        assert receiver.is_over
        assert (receiver.take_notices(), outputs(receiver)) == ([], [])

    def test_the_lease_does_not_end_under_those_who_adopt(self) -> None:
        receiver = verified()
        assert receiver.deadline() == math.inf
        receiver.tick(1000.0)
        receiver.adopted()
        receiver.tick(2000.0)
        assert receiver.is_adopted


class TestAdopting:
    def test_taken_back_while_adopting(self) -> None:
        receiver = verified()
        receiver.receive(Withdraw(FENCE, "redirected"), 0.0)
        assert receiver.take_notices() == []
        receiver.adopted()
        assert receiver.take_notices() == [Freed(3, "withdrawn: redirected")]
        assert outputs(receiver) == []  # it is not ours any more

    @pytest.mark.parametrize("message", [Withdraw(FENCE, "redirected"), Stale(FENCE, Generation(2))])
    def test_taken_back_after_adopting(self, message: HandoffMessage) -> None:
        receiver = adopted()
        receiver.receive(message, 0.0)
        (freed,) = receiver.take_notices()
        assert isinstance(freed, Freed)
        assert freed.num_verified == 3

    def test_an_adoption_that_fails_frees(self) -> None:
        receiver = verified()
        receiver.not_adopted("the engine is gone")
        assert receiver.take_notices() == [Freed(3, "the engine is gone")]
        receiver.receive(SEAL, 0.0)
        assert {type(message) for message in outputs(receiver)} == {Refuse}

    def test_p_may_be_gone_by_then(self) -> None:
        receiver = verified()
        receiver.lost()
        receiver.adopted()
        assert receiver.is_adopted
        receiver.lost()
        assert receiver.take_notices() == []

    def test_aborts_may_be_repeated(self) -> None:
        receiver = adopted()
        receiver.abort("by the router")
        receiver.abort("by the router")
        receiver.superseded(Generation(2))
        assert receiver.take_notices() == [Freed(3, "by the router")]
