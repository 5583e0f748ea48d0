"""Both halves, two decode workers and links that do their worst.

A world of these runs for some steps, each chosen by a ``Chooser``: by hypothesis, which makes a failure small, or by a
seeded generator, which sees far more of them.

always       D adopts right blocks only; a foreign fence changes nothing; P releases once, D ends a reservation once;
             nothing leaves P for a try after that try's end, and no copy runs into a block that was given back
in the end   the link heals, and then every half comes to its end
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer.fences import FenceTable, Refusals
from kvtransfer.integrity import BlockChecksum
from kvtransfer.receiver import Ask, Freed, Receiver, Verified
from kvtransfer.sender import Delivered, Held, Outbox, Released, SendBlock, Sender
from kvtransfer.states import ReceiveState, SendState
from proto.handoff import Frame, HandoffMessage, Located, RefuseReason, Stale
from proto.ids import Epoch, Generation
from tests.support.handoff import BLOCK, CHOICES, LAYOUT, content, make_fence, make_offer

T = TypeVar("T")

LEASE_S = 30.0
RTO_S = 1.0
NUM_BLOCKS = 5
JUNK = b"\xee" * BLOCK
SUM = BlockChecksum(BLOCK)


@dataclass
class Decode:
    """A decode worker: an epoch, and the fences that epoch has seen."""

    name: str
    num_lives: int = 1
    fences: FenceTable = field(init=False)

    def __post_init__(self) -> None:
        self.fences = FenceTable(self.epoch, 1000.0)

    @property
    def epoch(self) -> Epoch:
        return Epoch(f"{self.name}/{self.num_lives}")

    def restart(self) -> None:
        self.num_lives += 1
        self.fences = FenceTable(self.epoch, 1000.0)


@dataclass
class Try:
    """One link, under one fence: both its directions, and D's end of it."""

    outbox: Outbox
    decode: Decode
    receiver: Receiver
    is_up: bool = True
    to_d: list[HandoffMessage] = field(default_factory=list)
    to_p: list[HandoffMessage] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)
    copies: list[Frame] = field(default_factory=list)
    num_present: int = 0
    is_reserved: bool = False
    ends: list[str] = field(default_factory=list)


Chooser = Callable[[int], int]
"""One of the numbers below n."""


class World:
    def __init__(self, choose: Chooser) -> None:
        self.choose = choose
        self.now = 0.0
        self.is_healed = False
        self.located = self.happens(3)
        self.decodes = [Decode("a"), Decode("b")]
        num_blocks = 1 + choose(NUM_BLOCKS)
        fence = make_fence(decode=self.decodes[0].epoch)
        self.offer = make_offer(num_blocks, fence=fence, lease_s=LEASE_S, num_tokens=num_blocks * 4 - 1)
        self.right = [content(name) for name in self.offer.hashes]
        self.sums = [SUM.of(data, name) for data, name in zip(self.right, self.offer.hashes, strict=True)]
        self.prefill_memory = [JUNK] * num_blocks  # junk before a block is computed, and after it is let go
        self.num_ready = 0
        self.is_sealed = False
        self.sender = Sender(self.offer, Refusals(), 0.0, rto_s=RTO_S)
        self.num_released = 0
        self.delivered: list[Generation] = []
        self.is_dead = False
        self.tries: list[Try] = []
        self.seen: Counter[str] = Counter()
        self.sender.offer(self.now)
        self.connect(self.decodes[0])

    def happens(self, one_in: int) -> bool:
        return self.choose(one_in) == 0

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.choose(len(items))]

    def some_try(self) -> Try:
        """Mostly the current one."""
        return self.tries[-1] if self.choose(3) else self.one_of(self.tries)

    # The world around the halves.

    def connect(self, decode: Decode) -> None:
        receiver = Receiver(LAYOUT, decode.fences, self.now, patience_s=LEASE_S)
        self.tries.append(Try(self.sender.outbox, decode, receiver))

    def hear_p(self) -> None:
        for notice in self.sender.take_notices():
            match notice:
                case Released():
                    self.num_released += 1
                    self.seen["released"] += 1
                    self.prefill_memory = [JUNK] * len(self.offer.hashes)
                case Delivered():
                    self.seen["delivered"] += 1
                    self.delivered.append(self.sender.fence.generation)
                case Held():
                    self.seen["held"] += 1
        assert self.num_released == int(self.sender.is_released)

    def hear_d(self, each: Try) -> None:
        while notices := each.receiver.take_notices():
            for notice in notices:
                match notice:
                    case Ask():
                        self.answer(each)
                    case Verified():
                        assert not each.ends
                        assert [each.memory[index] for index in range(len(self.right))] == self.right
                        assert not each.copies
                        each.ends.append("adopted")
                        each.receiver.adopted()
                    case Freed(num_verified=num_verified):
                        assert each.is_reserved
                        assert each.ends in ([], ["adopted"])
                        assert not each.copies  # nothing writes into blocks that are given back
                        assert [each.memory[index] for index in range(num_verified)] == self.right[:num_verified]
                        each.ends.append("freed")
        while (message := each.receiver.next_output()) is not None:
            if each.is_up:
                each.to_p.append(message)

    def answer(self, each: Try) -> None:
        if not self.is_healed and self.happens(6):
            self.seen["refused"] += 1
            each.receiver.refused(RefuseReason.FULL)
            return
        each.num_present = self.choose(len(self.right) + 1) if self.happens(3) else 0
        each.memory = dict(enumerate(self.right[: each.num_present]))
        each.memory |= dict.fromkeys(range(each.num_present, len(self.right)), JUNK)
        each.is_reserved = True
        each.receiver.reserved(each.num_present, "memory", self.now)

    def flush_p(self, each: Try) -> None:
        """Everything that P has for that link leaves."""
        while (item := each.outbox.next(self.now)) is not None:
            if isinstance(item, SendBlock):
                assert not self.sender.is_released
                assert each.num_present <= item.index < self.num_ready
                place = Located(item.index * BLOCK)
                payload = place if self.located else self.prefill_memory[item.index]
                each.to_d.append(Frame(each.outbox.fence, item.index, self.sums[item.index], payload))
            elif each.is_up:
                each.to_d.append(item)
        if not each.is_up:
            each.to_d.clear()

    def deliver_to_d(self, each: Try, message: HandoffMessage) -> None:
        receiver = each.receiver
        before = (receiver.state, receiver.arrivals.num_verified, receiver.fence)
        receiver.receive(message, self.now)
        if before[2] is not None and message.fence != before[2]:
            assert (receiver.state, receiver.arrivals.num_verified, receiver.fence) == before
        for other in self.tries:
            self.hear_d(other)  # a newer try ends an older one

    def deliver_to_p(self, each: Try, message: HandoffMessage) -> None:
        before = (self.sender.state, self.sender.num_acked)
        reply = self.sender.receive(message, self.now)
        if message.fence != self.sender.fence:
            assert (self.sender.state, self.sender.num_acked) == before
            assert reply is None or (isinstance(reply, Stale) and reply.highest == self.sender.fence.generation)
        if reply is not None and each.is_up:
            each.to_d.append(reply)
        self.hear_p()

    def cut(self, each: Try, *, hears: bool = True) -> None:
        """The link is gone, with all that was on it."""
        if each.is_up:
            each.is_up = False
            each.to_d.clear()
            each.to_p.clear()
            self.sender.lost(each.outbox.fence)
            self.hear_p()
            if hears:
                each.receiver.lost()
                self.hear_d(each)

    def finish_copy(self, each: Try, frame: Frame) -> None:
        each.copies.remove(frame)
        payload = frame.payload
        data = self.prefill_memory[payload.offset // BLOCK] if isinstance(payload, Located) else bytes(payload)
        assert frame.index >= each.num_present  # what was present is shared with others
        assert each.memory[frame.index] != self.right[frame.index]  # and what is verified is not written again
        each.memory[frame.index] = data
        is_right = SUM.of(data, self.offer.hashes[frame.index]) == frame.checksum
        self.seen["right" if is_right else "damaged"] += 1
        each.receiver.placed(frame.index, is_right)
        self.hear_d(each)

    def pick(self, data: st.DataObject) -> Try:
        return data.draw(st.sampled_from(self.tries))

    # What P's engine and the router do.

    def compute(self) -> None:
        if self.is_sealed or self.sender.is_released:
            return
        if self.num_ready < len(self.right):
            self.prefill_memory[self.num_ready] = self.right[self.num_ready]
            self.num_ready += 1
            self.sender.blocks_ready(self.num_ready, self.now)
        else:
            self.is_sealed = True
            self.sender.seal(3, CHOICES, self.now)

    def redirect(self) -> None:
        if not self.sender.is_released and len(self.tries) < 6:
            decode = self.one_of(self.decodes)
            generation = Generation(self.sender.fence.generation + 1 + self.choose(2))
            self.sender.redirect(generation, decode.epoch, self.now)
            self.connect(decode)

    def abort(self) -> None:
        self.sender.withdraw("aborted")
        self.hear_p()

    def abort_on_d(self) -> None:
        each = self.some_try()
        each.decode.fences.end(self.offer.fence.request, each.outbox.fence.generation, self.now)
        for other in self.tries:
            self.hear_d(other)

    # What happens to processes.

    def kill_p(self) -> None:
        """It and its memory are gone; nobody hears of it but by the links."""
        for each in self.tries:
            self.cut(each)
        self.sender.withdraw("dead")
        self.hear_p()

    def restart_d(self) -> None:
        decode = self.one_of(self.decodes)
        for each in [each for each in self.tries if each.decode is decode]:
            each.copies.clear()
            self.cut(each, hears=False)
        self.tries = [each for each in self.tries if each.decode is not decode]
        decode.restart()
        if not self.tries:
            self.connect(decode)  # another incarnation answers at the old address

    # What happens on the way.

    def arrive_at_d(self) -> None:
        each = self.some_try()
        self.flush_p(each)
        if each.to_d:
            at = self.choose(len(each.to_d)) if self.happens(3) else 0
            message = each.to_d[at] if self.happens(5) else each.to_d.pop(at)
            if self.happens(6) and isinstance(message, Frame) and not isinstance(message.payload, Located):
                message = replace(message, payload=b"\x55" + bytes(message.payload)[1:])
            self.deliver_to_d(each, message)

    def arrive_at_p(self) -> None:
        each = self.some_try()
        if each.to_p:
            at = self.choose(len(each.to_p)) if self.happens(3) else 0
            self.deliver_to_p(each, each.to_p[at] if self.happens(5) else each.to_p.pop(at))

    def get_lost(self) -> None:
        each = self.some_try()
        self.flush_p(each)
        queue = each.to_d if self.happens(2) else each.to_p
        if queue:
            queue.pop(self.choose(len(queue)))

    def go_astray(self) -> None:
        """A message of one try turns up on the link of another."""
        source, target = self.some_try(), self.some_try()
        if source.to_d and source is not target and target.is_up and target.receiver.fence is not None:
            self.deliver_to_d(target, self.one_of(source.to_d))

    def come_again(self) -> None:
        """A duplicate of an Offer reaches its worker on a link of its own."""
        each = self.some_try()
        if each.receiver.fence is not None:
            offer = replace(self.offer, fence=each.receiver.fence)
            echo = Receiver(LAYOUT, each.decode.fences, self.now)
            echo.receive(offer, self.now)
            assert echo.take_notices() == []
            assert isinstance(echo.next_output(), Stale)

    def lose_link(self) -> None:
        self.cut(self.some_try())

    def take_frames(self) -> None:
        each = self.some_try()
        each.copies += each.receiver.take_frames(1 + self.choose(3))

    def end_a_copy(self) -> None:
        each = self.some_try()
        if each.copies:
            self.finish_copy(each, self.one_of(each.copies))

    def wait(self, seconds: float | None = None) -> None:
        self.now += self.one_of((0.1, 1.0, 1.0, 3.0, 9.0)) if seconds is None else seconds
        self.sender.tick(self.now)
        self.hear_p()
        for each in self.tries:
            each.receiver.tick(self.now)
            self.hear_d(each)

    def step(self) -> None:
        self.one_of(self.often * 6 + self.sometimes * 2 + self.seldom)()

    @property
    def often(self) -> list[Callable[[], None]]:
        return [self.arrive_at_d, self.arrive_at_d, self.arrive_at_p, self.compute, self.take_frames, self.end_a_copy]

    @property
    def sometimes(self) -> list[Callable[[], None]]:
        return [self.wait, self.get_lost, self.go_astray, self.come_again]

    @property
    def seldom(self) -> list[Callable[[], None]]:
        # The worst only sometimes in a world's life, so that most worlds get far enough to suffer from it.
        worst = [self.redirect, self.abort, self.abort_on_d, self.kill_p, self.restart_d, self.lose_link]
        return [self.redirect] + (worst if self.happens(6) else [])

    # The end.

    def end(self) -> None:
        self.is_healed = True
        for _ in range(200):
            if self.sender.is_released:
                break
            self.settle_once()
        assert self.sender.is_released, self.sender.state
        assert self.num_released == 1
        for _ in range(3):
            for each in self.tries:
                self.exchange(each)
        for each in self.tries:
            # P's process ends: its links do.
            self.exchange(each)
            self.cut(each)
            while each.copies:
                self.finish_copy(each, each.copies[0])
        self.check_ends()

    def settle_once(self) -> None:
        self.sender.renew(LEASE_S, self.now)
        if not self.is_sealed:
            self.compute()
        if self.sender.state is SendState.HELD:
            decode = self.one_of(self.decodes)
            self.sender.redirect(Generation(self.sender.fence.generation + 1), decode.epoch, self.now)
            self.connect(decode)
        for each in list(self.tries):
            self.exchange(each)
        self.wait(RTO_S)

    def exchange(self, each: Try) -> None:
        self.flush_p(each)
        while each.to_d:
            self.deliver_to_d(each, each.to_d.pop(0))
        each.copies += each.receiver.take_frames(100)
        while each.copies:
            self.finish_copy(each, each.copies[0])
        while each.to_p:
            self.deliver_to_p(each, each.to_p.pop(0))

    def check_ends(self) -> None:
        for each in self.tries:
            state = each.receiver.state
            assert state in (ReceiveState.ADOPTED, ReceiveState.FREED), state
            assert each.ends in ([], ["adopted"], ["freed"], ["adopted", "freed"])
            self.seen[", ".join(each.ends)] += 1
            assert bool(each.ends) == each.is_reserved
            assert (each.ends == ["adopted"]) == (state is ReceiveState.ADOPTED)
            if each.outbox.fence.generation in self.delivered and each.decode.epoch == each.outbox.fence.decode_epoch:
                assert "adopted" in each.ends


def live(choose: Chooser, num_steps: int) -> World:
    world = World(choose)
    for _ in range(num_steps):
        world.step()
    world.end()
    return world


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_worlds_of_hypothesis(data: st.DataObject) -> None:
    live(lambda n: data.draw(st.integers(0, n - 1)), 40)


@pytest.mark.parametrize("num_steps", [30, 60, 120, 240])
def test_many_worlds(num_steps: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(400):
        try:
            seen += live(random.Random(f"{num_steps}/{seed}").randrange, num_steps).seen
        except BaseException as failure:
            failure.add_note(f"in the world of seed {seed}")
            raise
    # Worth something only if the worlds have seen all of it.
    assert set(seen) >= {"adopted", "freed", "adopted, freed", "refused", "damaged", "held", "released", "delivered"}
