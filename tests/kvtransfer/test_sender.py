"""P's half: what it sends when, what it keeps, and what it thinks of messages that do not fit."""

from __future__ import annotations

import pytest

from kvtransfer.fences import Refusals, Refused
from kvtransfer.sender import Delivered, Granted, Held, Outbox, Released, SendBlock, Sender
from kvtransfer.states import SendState
from proto.errors import LocalProtocolError, RemoteProtocolError
from proto.handoff import (
    Ack,
    Adopted,
    Grant,
    HandoffMessage,
    Nack,
    Offer,
    Refuse,
    RefuseReason,
    Seal,
    SealedChoice,
    Stale,
    Withdraw,
)
from proto.ids import Epoch, Generation
from tests.support.handoff import CHOICES, make_fence, make_frame, make_offer, make_seal, redirected

OFFER = make_offer(4)
FENCE = OFFER.fence


def sent(outbox: Outbox, now: float = 0.0) -> list[object]:
    """What leaves, blocks as their indices."""
    items: list[object] = []
    while (item := outbox.next(now)) is not None:
        items.append(item.index if isinstance(item, SendBlock) else item)
    return items


def make(offer: Offer = OFFER, *, refusals: Refusals | None = None, rto_s: float | None = None) -> Sender:
    return Sender(offer, Refusals() if refusals is None else refusals, 0.0, rto_s=rto_s)


def offered(**options: float | Refusals | None) -> Sender:
    sender = make(**options)  # type: ignore[arg-type]
    sender.offer(0.0)
    assert sent(sender.outbox) == [OFFER]
    return sender


def streaming(num_present: int = 0, **options: float | Refusals | None) -> Sender:
    sender = offered(**options)
    sender.receive(Grant(FENCE, num_present, "memory"), 0.0)
    assert sender.take_notices() == [Granted(num_present, "memory")]
    return sender


def sealed(num_present: int = 0, **options: float | Refusals | None) -> Sender:
    sender = streaming(num_present, **options)
    sender.blocks_ready(4, 0.0)
    sender.seal(4, CHOICES, 0.0)
    assert sent(sender.outbox) == [*range(num_present, 4), make_seal(OFFER)]
    return sender


class TestSending:
    def test_what_comes_next_is_seen_without_being_taken(self) -> None:
        sender = streaming()
        sender.blocks_ready(4, 0.0)
        sender.seal(4, CHOICES, 0.0)
        assert [block.index for block in sender.outbox.upcoming(9)] == [0, 1, 2, 3], "up to the seal"
        assert [block.index for block in sender.outbox.upcoming(2)] == [0, 1]
        assert sender.outbox.upcoming(0) == []
        assert sent(sender.outbox) == [0, 1, 2, 3, make_seal(OFFER)]
        assert sender.outbox.upcoming(9) == []

    def test_blocks_go_as_they_become_ready_and_the_seal_behind_them(self) -> None:
        sender = streaming()
        sender.blocks_ready(2, 0.0)
        assert sent(sender.outbox) == [0, 1]
        sender.blocks_ready(4, 0.0)
        assert sent(sender.outbox) == [2, 3]
        sender.seal(4, CHOICES, 0.0)
        assert sent(sender.outbox) == [make_seal(OFFER)]
        assert sender.state is SendState.SEALED

    def test_what_was_computed_before_the_grant_goes_at_once(self) -> None:
        sender = offered()
        sender.blocks_ready(4, 0.0)
        sender.seal(4, CHOICES, 0.0)
        assert sent(sender.outbox) == []
        assert sender.state is SendState.OFFERED
        sender.receive(Grant(FENCE, 2, "memory"), 0.0)
        assert sent(sender.outbox) == [2, 3, make_seal(OFFER)]

    def test_only_missing_blocks_are_sent(self) -> None:
        sender = streaming(num_present=3)
        sender.blocks_ready(2, 0.0)
        assert sent(sender.outbox) == []
        sender.blocks_ready(4, 0.0)
        assert sent(sender.outbox) == [3]

    def test_adoption_is_the_end(self) -> None:
        sender = sealed()
        sender.receive(Adopted(FENCE), 1.0)
        assert sender.take_notices() == [Delivered(), Released("adopted")]
        assert (sender.state, sent(sender.outbox), sender.outbox.is_closed) == (SendState.RELEASED, [], True)

    def test_a_damaged_block_is_sent_again(self) -> None:
        refusals = Refusals()
        sender = sealed(refusals=refusals)
        sender.receive(Nack(FENCE, 2), 0.0)
        assert sent(sender.outbox) == [2]
        assert sender.num_resent == 1
        sender.receive(Ack(FENCE, 3), 0.0)
        sender.receive(Nack(FENCE, 2), 0.0)  # a late echo
        assert sent(sender.outbox) == []
        assert refusals.num_damaged == 1

    def test_acks_never_go_back(self) -> None:
        sender = sealed()
        sender.receive(Ack(FENCE, 3), 0.0)
        sender.receive(Ack(FENCE, 1), 0.0)
        assert sender.num_acked == 3


class TestKeeping:
    @pytest.mark.parametrize("make_state", [offered, streaming, sealed])
    def test_refused_blocks_are_kept_for_another(self, make_state) -> None:  # type: ignore[no-untyped-def]
        sender = make_state()
        sender.receive(Refuse(FENCE, RefuseReason.FULL, "no room", 2.0), 0.0)
        assert sender.take_notices() == [Held(RefuseReason.FULL, "no room", 2.0)]
        assert (sender.state, sender.outbox.is_closed) == (SendState.HELD, True)

    @pytest.mark.parametrize("make_state", [offered, streaming, sealed])
    def test_a_lost_decode_worker_leaves_them_kept(self, make_state) -> None:  # type: ignore[no-untyped-def]
        sender = make_state()
        sender.lost(FENCE)
        sender.lost(FENCE)
        (notice,) = sender.take_notices()
        assert isinstance(notice, Held)
        assert notice.reason is None
        assert sender.state is SendState.HELD

    @pytest.mark.parametrize("make_state", [offered, streaming, sealed])
    @pytest.mark.parametrize("highest", [1, 2, 9])
    def test_a_try_that_is_over_on_the_other_side_is_not_the_end_of_the_blocks(self, make_state, highest: int) -> None:  # type: ignore[no-untyped-def]
        """However new a try the decode worker has seen: the router's redirect may still be on its way."""
        sender = make_state()
        sender.receive(Stale(FENCE, Generation(highest)), 0.0)
        (notice,) = sender.take_notices()
        assert isinstance(notice, Held)
        assert notice.reason is RefuseReason.STALE
        assert (sender.state, sent(sender.outbox)) == (SendState.HELD, [])
        outbox = sender.redirect(Generation(2), Epoch("d2"), 0.0)
        assert sent(outbox) == [redirected(OFFER, 2, "d2")]

    def test_a_worker_that_never_saw_the_try_is_not_the_one_we_mean(self) -> None:
        sender = offered()
        sender.receive(Stale(FENCE, Generation(0)), 0.0)
        assert sender.state is SendState.HELD
        (notice,) = sender.take_notices()
        assert isinstance(notice, Held)
        assert notice.reason is None

    def test_the_loss_of_an_old_link_is_no_news(self) -> None:
        sender = streaming()
        sender.redirect(Generation(2), Epoch("d2"), 0.0)
        sender.lost(FENCE)
        assert sender.state is SendState.OFFERED

    def test_computing_goes_on_while_held(self) -> None:
        sender = offered()
        sender.lost(FENCE)
        sender.blocks_ready(4, 0.0)
        sender.seal(4, CHOICES, 0.0)
        outbox = sender.redirect(Generation(2), Epoch("d2"), 0.0)
        second = redirected(OFFER, 2, "d2")
        assert sent(outbox) == [second]
        sender.receive(Grant(second.fence, 0, "memory"), 0.0)
        assert sent(outbox) == [0, 1, 2, 3, make_seal(second)]

    def test_a_redirect_takes_the_old_one_leave_and_starts_over(self) -> None:
        sender = sealed()
        old = sender.outbox
        sender.receive(Ack(FENCE, 3), 0.0)
        sender.receive(Nack(FENCE, 3), 0.0)
        outbox = sender.redirect(Generation(5), Epoch("d2"), 0.0)
        assert sent(old) == [Withdraw(FENCE, "redirected")]
        assert old.is_closed
        assert sent(outbox) == [redirected(OFFER, 5, "d2")]
        assert (sender.state, sender.num_acked, sender.transport) == (SendState.OFFERED, 0, None)

    def test_who_has_refused_needs_no_leave(self) -> None:
        sender = offered()
        sender.receive(Refuse(FENCE, RefuseReason.FULL), 0.0)
        old = sender.outbox
        sender.redirect(Generation(2), Epoch("d2"), 0.0)
        assert sent(old) == []

    @pytest.mark.parametrize("generation", [0, 1])
    def test_redirects_go_up(self, generation: int) -> None:
        with pytest.raises(LocalProtocolError):
            streaming().redirect(Generation(generation), Epoch("d2"), 0.0)


class TestLettingGo:
    @pytest.mark.parametrize("make_state", [offered, streaming, sealed])
    def test_withdraw_says_so_and_sends_nothing_more(self, make_state) -> None:  # type: ignore[no-untyped-def]
        sender = make_state()
        sender.withdraw("aborted")
        sender.withdraw("aborted")
        assert sent(sender.outbox) == [Withdraw(FENCE, "aborted")]
        assert sender.take_notices() == [Released("aborted")]

    def test_where_nobody_was_asked_nobody_is_told(self) -> None:
        sender = make()
        sender.withdraw("aborted")
        assert sent(sender.outbox) == []
        assert sender.is_released

    def test_the_lease_ends_in_any_state(self) -> None:
        for sender in (make(), offered(), streaming(), sealed()):
            sender.tick(29.9)
            assert not sender.is_released
            sender.tick(30.0)
            assert sender.take_notices() == [Released("the lease has ended")]

    def test_a_renewed_lease_ends_later(self) -> None:
        sender = make()
        sender.renew(30.0, 20.0)
        sender.tick(49.0)
        assert not sender.is_released
        assert sender.deadline() == 50.0

    def test_after_the_end_everything_is_an_echo(self) -> None:
        refusals = Refusals()
        sender = sealed(refusals=refusals)
        sender.receive(Adopted(FENCE), 0.0)
        sender.take_notices()
        messages: list[HandoffMessage] = [
            Adopted(FENCE),
            Ack(FENCE, 4),
            Nack(FENCE, 1),
            Refuse(FENCE, RefuseReason.STALE),
        ]
        for message in messages:
            assert sender.receive(message, 0.0) is None
        assert (refusals[Refused.LATE], refusals.total) == (3, 3), "a Refuse ends what has ended"
        sender.tick(1000.0)
        sender.renew(5.0, 0.0)
        sender.lost(FENCE)
        assert (sender.take_notices(), sent(sender.outbox)) == ([], [])


class TestFences:
    @pytest.mark.parametrize(
        ("fence", "reason"),
        [
            (make_fence(1, decode="d1"), Refused.STALE_GENERATION),
            (make_fence(2, decode="another"), Refused.FOREIGN_EPOCH),
            (make_fence(2, prefill="before", decode="d2"), Refused.FOREIGN_EPOCH),
            (make_fence(2, request="r.2", decode="d2"), Refused.UNKNOWN),
        ],
    )
    def test_a_message_of_another_fence_is_counted_and_answered(self, fence, reason) -> None:  # type: ignore[no-untyped-def]
        refusals = Refusals()
        sender = Sender(make_offer(4, fence=make_fence(2, decode="d2")), refusals, 0.0)
        sender.offer(0.0)
        for message in (Grant(fence, 0, "memory"), Adopted(fence), Refuse(fence, RefuseReason.FULL)):
            assert sender.receive(message, 0.0) == Stale(fence, Generation(2))
        assert sender.receive(Stale(fence, Generation(9)), 0.0) is None  # or two could go on for ever
        assert sender.state is SendState.OFFERED
        assert (refusals[reason], refusals.total) == (4, 4)


class TestFaults:
    @pytest.mark.parametrize(
        "message",
        [
            Ack(FENCE, 0),
            Nack(FENCE, 0),
            Adopted(FENCE),
            Grant(FENCE, 5, "memory"),
            Grant(FENCE, 0, "pigeon"),
            OFFER,
            make_frame(OFFER, 0),
            make_seal(OFFER),
            Withdraw(FENCE),
        ],
    )
    def test_what_d_may_not_say_to_an_offer(self, message: HandoffMessage) -> None:
        sender = offered()
        with pytest.raises(RemoteProtocolError):
            sender.receive(message, 0.0)
        assert sender.state is SendState.OFFERED

    @pytest.mark.parametrize("message", [Ack(FENCE, 3), Nack(FENCE, 2), Adopted(FENCE), Grant(FENCE, 1, "memory")])
    def test_what_d_may_not_say_of_two_blocks(self, message: HandoffMessage) -> None:
        sender = streaming()
        sender.blocks_ready(2, 0.0)
        with pytest.raises(RemoteProtocolError):
            sender.receive(message, 0.0)
        assert sender.num_acked == 0

    def test_answers_to_what_was_never_asked(self) -> None:
        with pytest.raises(RemoteProtocolError):
            make().receive(Grant(FENCE, 0, "memory"), 0.0)

    def test_a_repeated_grant_is_no_fault(self) -> None:
        sender = sealed()
        sender.receive(Grant(FENCE, 0, "memory"), 0.0)
        assert (sender.take_notices(), sent(sender.outbox)) == ([], [])

    def test_our_own_disorder(self) -> None:
        sender = offered()
        with pytest.raises(LocalProtocolError):
            sender.offer(0.0)
        with pytest.raises(LocalProtocolError):
            sender.blocks_ready(5, 0.0)
        with pytest.raises(LocalProtocolError):
            sender.seal(4, CHOICES, 0.0)
        sender.blocks_ready(4, 0.0)
        with pytest.raises(LocalProtocolError):
            sender.blocks_ready(3, 0.0)
        with pytest.raises(LocalProtocolError):
            sender.seal(4, (SealedChoice(1), SealedChoice(2)), 0.0)
        sender.seal(4, CHOICES, 0.0)
        with pytest.raises(LocalProtocolError):
            sender.seal(4, CHOICES, 0.0)
        sender.withdraw("done")
        with pytest.raises(LocalProtocolError):
            sender.redirect(Generation(2), Epoch("d2"), 0.0)
        with pytest.raises(LocalProtocolError):
            Sender(make_offer(1, lease_s=0.0), Refusals(), 0.0)


class TestRepeating:
    def test_an_unanswered_offer_is_repeated_less_and_less_often(self) -> None:
        sender = offered(rto_s=1.0)
        times = []
        for now in (each / 2 for each in range(60)):
            sender.renew(30.0, now)
            sender.tick(now)
            if sent(sender.outbox, now):
                times.append(now)
        assert times == [1.0, 3.0, 7.0, 15.0, 23.0]

    def test_unacknowledged_blocks_and_the_seal_are_repeated(self) -> None:
        sender = sealed(rto_s=1.0)
        sender.receive(Ack(FENCE, 2), 0.5)
        sender.tick(1.4)
        assert sent(sender.outbox, 1.4) == []
        sender.tick(1.5)
        assert sent(sender.outbox, 1.5) == [2, 3, make_seal(OFFER)]
        assert sender.num_resent == 2

    def test_nothing_is_repeated_that_has_not_left_yet(self) -> None:
        sender = streaming(rto_s=1.0)
        sender.blocks_ready(4, 0.0)
        sender.outbox.next(0.0)
        sender.tick(20.0)  # a slow link
        assert sent(sender.outbox, 20.0) == [1, 2, 3]

    def test_progress_ends_the_backing_off(self) -> None:
        sender = sealed(rto_s=1.0)
        sender.tick(1.0)
        assert sent(sender.outbox, 1.0)
        sender.receive(Ack(FENCE, 1), 1.5)
        assert sender.deadline() == 2.5

    def test_over_a_reliable_link_only_the_lease_is_kept_alive(self) -> None:
        sender = sealed()
        assert sender.deadline() == 10.0
        sender.tick(10.0)
        items = sent(sender.outbox, 10.0)
        assert items == [make_seal(OFFER)]
        assert isinstance(items[0], Seal)
        sender = streaming()
        sender.renew(60.0, 5.0)
        sender.tick(20.0)
        (offer,) = sent(sender.outbox, 20.0)
        assert isinstance(offer, Offer)
        assert offer.lease_s == 60.0

    def test_nobody_is_kept_alive_while_held(self) -> None:
        sender = offered()
        sender.lost(FENCE)
        assert sender.deadline() == 30.0
        sender.tick(20.0)
        assert sent(sender.outbox, 20.0) == []
