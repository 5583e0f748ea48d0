"""Both halves, two decode workers and a link that does its worst, driven by hypothesis.

always       D adopts right blocks only; a foreign fence changes nothing; P releases once, D ends a reservation once;
             nothing leaves P for a try after that try's end, and no copy runs into a block that was given back
in the end   the link heals, and then every half comes to its end
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvtransfer.fences import FenceTable, Refusals
from kvtransfer.integrity import BlockChecksum
from kvtransfer.receiver import Ask, Freed, Receiver, Verified
from kvtransfer.sender import Delivered, Held, Outbox, Released, SendBlock, Sender
from kvtransfer.states import ReceiveState, SendState
from proto.handoff import Frame, HandoffMessage, Located, RefuseReason, Stale
from proto.ids import Epoch, Generation
from tests.support.handoff import BLOCK, CHOICES, LAYOUT, content, make_fence, make_offer

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


class LossyLink(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, NUM_BLOCKS), located=st.booleans(), seed=st.integers(0, 1 << 16))
    def begin(self, num_blocks: int, located: bool, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.is_healed = False
        self.located = located
        self.decodes = [Decode("a"), Decode("b")]
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
        self.held: list[Held] = []
        self.is_dead = False
        self.tries: list[Try] = []
        self.sender.offer(self.now)
        self.connect(self.decodes[0])

    # The world around the halves.

    def connect(self, decode: Decode) -> None:
        receiver = Receiver(LAYOUT, decode.fences, self.now, patience_s=LEASE_S)
        self.tries.append(Try(self.sender.outbox, decode, receiver))

    def hear_p(self) -> None:
        for notice in self.sender.take_notices():
            match notice:
                case Released():
                    self.num_released += 1
                    self.prefill_memory = [JUNK] * len(self.offer.hashes)
                case Delivered():
                    self.delivered.append(self.sender.fence.generation)
                case Held():
                    self.held.append(notice)
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
        if not self.is_healed and self.rng.random() < 0.2:
            each.receiver.refused(RefuseReason.FULL)
            return
        each.num_present = self.rng.randint(0, len(self.right) - 1)
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
        self.hear_d(each)

    def deliver_to_p(self, each: Try, message: HandoffMessage) -> None:
        before = (self.sender.state, self.sender.num_acked)
        reply = self.sender.receive(message, self.now)
        if message.fence != self.sender.fence:
            assert (self.sender.state, self.sender.num_acked) == before
            assert reply is None or (isinstance(reply, Stale) and reply.highest == self.sender.fence.generation)
        if reply is not None and each.is_up:
            each.to_d.append(reply)
        self.hear_p()

    def cut(self, each: Try) -> None:
        """The link is gone, with all that was on it."""
        if each.is_up:
            each.is_up = False
            each.to_d.clear()
            each.to_p.clear()
            self.sender.lost(each.outbox.fence)
            self.hear_p()
            each.receiver.lost()
            self.hear_d(each)

    def finish_copy(self, each: Try, frame: Frame) -> None:
        each.copies.remove(frame)
        payload = frame.payload
        data = self.prefill_memory[payload.offset // BLOCK] if isinstance(payload, Located) else bytes(payload)
        assert each.memory[frame.index] != self.right[frame.index] or frame.index >= each.num_present
        each.memory[frame.index] = data
        each.receiver.placed(frame.index, SUM.of(data, self.offer.hashes[frame.index]) == frame.checksum)
        self.hear_d(each)

    def pick(self, data: st.DataObject) -> Try:
        return data.draw(st.sampled_from(self.tries))

    # What P's engine and the router do.

    @precondition(lambda self: not self.is_sealed and not self.sender.is_released)
    @rule()
    def compute(self) -> None:
        if self.num_ready < len(self.right):
            self.prefill_memory[self.num_ready] = self.right[self.num_ready]
            self.num_ready += 1
            self.sender.blocks_ready(self.num_ready, self.now)
        else:
            self.is_sealed = True
            self.sender.seal(3, CHOICES, self.now)

    @precondition(lambda self: not self.sender.is_released and len(self.tries) < 6)
    @rule(data=st.data())
    def redirect(self, data: st.DataObject) -> None:
        decode = data.draw(st.sampled_from(self.decodes))
        generation = Generation(self.sender.fence.generation + data.draw(st.integers(1, 2)))
        self.sender.redirect(generation, decode.epoch, self.now)
        self.connect(decode)

    @rule(rarely=st.integers(0, 20))
    def abort(self, rarely: int) -> None:
        if rarely == 0:
            self.sender.withdraw("aborted")
            self.hear_p()

    @rule(rarely=st.integers(0, 10), data=st.data())
    def abort_on_d(self, rarely: int, data: st.DataObject) -> None:
        each = self.pick(data)
        if rarely == 0:
            each.decode.fences.end(self.offer.fence.request, each.outbox.fence.generation, self.now)
            for other in self.tries:
                self.hear_d(other)

    # What happens to processes.

    @rule(rarely=st.integers(0, 15))
    def restart_p(self, rarely: int) -> None:
        if rarely == 0 and not self.is_dead:
            self.is_dead = True
            for each in self.tries:
                self.cut(each)
            self.sender.withdraw("dead")  # the process and its memory are gone; nobody hears it
            self.hear_p()

    @rule(rarely=st.integers(0, 15), data=st.data())
    def restart_d(self, rarely: int, data: st.DataObject) -> None:
        decode = data.draw(st.sampled_from(self.decodes))
        if rarely == 0:
            for each in [each for each in self.tries if each.decode is decode]:
                self.cut(each)
                each.copies.clear()
            self.tries = [each for each in self.tries if each.decode is not decode]
            decode.restart()
            if not self.tries:
                self.connect(decode)  # P's old address: another incarnation answers

    # What happens on the way.

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.flush_p(self.pick(data))

    @rule(data=st.data(), repeat=st.booleans(), damage=st.booleans())
    def arrive_at_d(self, data: st.DataObject, repeat: bool, damage: bool) -> None:
        each = self.pick(data)
        self.flush_p(each)
        if each.to_d:
            at = data.draw(st.integers(0, len(each.to_d) - 1))
            message = each.to_d[at] if repeat else each.to_d.pop(at)
            if damage and isinstance(message, Frame) and not isinstance(message.payload, Located):
                message = replace(message, payload=b"\x55" + bytes(message.payload)[1:])
            self.deliver_to_d(each, message)

    @rule(data=st.data(), repeat=st.booleans())
    def arrive_at_p(self, data: st.DataObject, repeat: bool) -> None:
        each = self.pick(data)
        if each.to_p:
            at = data.draw(st.integers(0, len(each.to_p) - 1))
            self.deliver_to_p(each, each.to_p[at] if repeat else each.to_p.pop(at))

    @rule(data=st.data(), forth=st.booleans())
    def get_lost(self, data: st.DataObject, forth: bool) -> None:
        each = self.pick(data)
        self.flush_p(each)
        queue = each.to_d if forth else each.to_p
        if queue:
            queue.pop(data.draw(st.integers(0, len(queue) - 1)))

    @rule(data=st.data())
    def go_astray(self, data: st.DataObject) -> None:
        """A message of one try turns up on the link of another."""
        source, target = self.pick(data), self.pick(data)
        if source.to_d and source is not target:
            message = data.draw(st.sampled_from(source.to_d))
            if target.receiver.fence is not None and target.is_up:
                self.deliver_to_d(target, message)

    @rule(rarely=st.integers(0, 8), data=st.data())
    def lose_link(self, rarely: int, data: st.DataObject) -> None:
        each = self.pick(data)
        if rarely == 0:
            self.cut(each)

    @rule(data=st.data())
    def take_frames(self, data: st.DataObject) -> None:
        each = self.pick(data)
        each.copies += each.receiver.take_frames(data.draw(st.integers(1, 3)))

    @rule(data=st.data())
    def end_a_copy(self, data: st.DataObject) -> None:
        each = self.pick(data)
        if each.copies:
            self.finish_copy(each, data.draw(st.sampled_from(each.copies)))

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0, 3.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.sender.tick(self.now)
        self.hear_p()
        for each in self.tries:
            each.receiver.tick(self.now)
            self.hear_d(each)

    # The end.

    def teardown(self) -> None:
        if not hasattr(self, "sender"):
            return
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
            decode = self.rng.choice(self.decodes)
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
            assert bool(each.ends) == each.is_reserved
            assert (each.ends == ["adopted"]) == (state is ReceiveState.ADOPTED)
        for generation in self.delivered:
            takers = [each for each in self.tries if each.outbox.fence.generation == generation]
            assert all("adopted" in each.ends for each in takers)  # none, where that worker has died since


LossyLink.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLossyLink = LossyLink.TestCase
