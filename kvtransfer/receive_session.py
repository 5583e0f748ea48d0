"""Drives the decode side of one hand-off: a Receiver, its link, its timer, and the bytes.

    steer   deadlines and notices, one at a time, until the blocks have an owner or are free
    read    messages in, as fast as blocks are placed
    write   messages out
    place   payloads into our blocks, and checks them there

Nothing here waits for the engine, but the intake's own answers.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Sequence

from kvtransfer.fences import FenceTable, Refused
from kvtransfer.intake import Intake, Refusal
from kvtransfer.receiver import Ask, Freed, Receiver, Sealed, Verified
from kvtransfer.states import ReceiveState
from kvtransfer.sums import block_sums
from kvtransfer.tasks import off_loop, stop, to_the_end, wait_until
from kvtransfer.transport import BlockStore, Link, LinkLost
from kvtransfer.transports import GRPC, MEMORY, InlineReader, PayloadReader, PayloadSource, choose
from proto.errors import RemoteProtocolError
from proto.handoff import Fence, Frame, Offer, RefuseReason
from proto.ids import BlockId

LINGER_S = 5.0
"""After Adopted: how long P may take to hear of it. After a refusal: how long that may take to leave."""
MAX_WAITING_BATCHES = 4
"""How much may wait to be placed before nothing more is read: the link's flow control does the rest."""

INLINE: tuple[PayloadReader, ...] = (InlineReader(GRPC), InlineReader(MEMORY))


class ReceiveSession:
    """Takes over one prompt's blocks from the peer at the other end of ``link``.

    Every reservation that ``intake`` makes ends in its ``adopted`` or its ``freed`` before ``run`` returns.
    ``readers``: the transports that may be used.
    """

    def __init__(
        self,
        link: Link,
        store: BlockStore,
        intake: Intake,
        fences: FenceTable,
        *,
        readers: Sequence[PayloadReader] = INLINE,
        patience_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_bytes = 0
        """Payload bytes placed in our memory, damaged ones included."""
        self._link = link
        self._store = store
        self._intake = intake
        self._refusals = fences.refusals
        self._readers = readers
        self._clock = clock
        self._receiver = Receiver(store.layout, fences, clock(), patience_s=patience_s, on_superseded=self._changed)
        self._sums = block_sums(store)
        self._source: PayloadSource | None = None
        self._offer: Offer | None = None
        self._blocks: Sequence[BlockId] = ()
        self._granted_at = clock()
        self._linger_until: float | None = None
        self._is_lost = False
        self._is_sending = False
        self._fault: Exception | None = None
        # One signal for each task that waits for the receiver to change.
        self._wake, self._outputs, self._frames, self._room = (asyncio.Event() for _ in range(4))

    @property
    def state(self) -> ReceiveState:
        return self._receiver.state

    @property
    def fence(self) -> Fence | None:
        """None until an Offer was admitted."""
        return self._receiver.fence

    def abort(self, reason: str) -> None:
        """The router lets go of the request, or this worker does. After ``adopted``, too, ``freed`` follows."""
        self._receiver.abort(reason)
        self._changed()

    def renew(self, lease_s: float) -> None:
        self._receiver.renew(lease_s, self._clock())
        self._changed()

    async def run(self) -> None:
        """Returns when the hand-off is over and the link is closed. Cancelled, it frees what is not yet adopted.

        Raises what the intake or the store raised, once everything is given back.
        """
        await to_the_end(self._serve(), self._give_up)

    def _give_up(self) -> None:
        self._is_lost = True
        if not self._receiver.is_adopted:
            self._receiver.abort("cancelled")
        self._changed()

    async def _serve(self) -> None:
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write(), self._place())]
        for task in tasks:
            task.add_done_callback(self._check)
        try:
            await self._steer()
        finally:
            await stop(*tasks)
            if self._source is not None:
                self._source.close()
            self._receiver.close(self._clock())
            await self._link.close()
        if self._fault is not None:
            raise self._fault

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(fault := task.exception(), Exception):
            self._fail(fault)

    def _fail(self, fault: Exception) -> None:
        """Our own side is broken: the hand-off ends, and whoever started it hears why."""
        self._fault = self._fault or fault
        if not self._receiver.is_adopted:
            self._receiver.abort("internal error")
        self._changed()

    def _changed(self) -> None:
        for event in (self._wake, self._outputs, self._frames, self._room):
            event.set()

    # Steering.

    async def _steer(self) -> None:
        while True:
            self._receiver.tick(self._clock())
            while notices := self._receiver.take_notices():
                for notice in notices:
                    await self._act(notice)
            self._changed()
            self._wake.clear()
            deadline = self._deadline()
            if deadline <= self._clock():
                return
            await wait_until(self._wake, deadline, self._clock)

    def _deadline(self) -> float:
        """When to look again; the past where all is done and said."""
        if not self._receiver.is_over and not self._receiver.is_adopted:
            # A lease that ended just now is dealt with in the next round.
            return max(self._receiver.deadline(), math.nextafter(self._clock(), math.inf))
        is_said = self._receiver.is_over and not self._receiver.has_output and not self._is_sending
        if self._is_lost or is_said:
            return -math.inf
        if self._linger_until is None:
            self._linger_until = self._clock() + LINGER_S
        return self._linger_until

    async def _act(self, notice: Ask | Sealed | Verified | Freed) -> None:
        fence = self._receiver.fence
        assert fence is not None, "a notice follows an Offer"
        try:
            match notice:
                case Ask(offer=offer):
                    await self._ask(offer)
                case Sealed(seal=seal):
                    await self._intake.sealed(fence, seal)
                case Verified(seal=seal):
                    await self._intake.adopted(fence, seal, self.num_bytes, self._clock() - self._granted_at)
                    self._receiver.adopted()
                case Freed(num_verified=num_verified, reason=reason):
                    await self._intake.freed(fence, num_verified, reason)
        except Exception as fault:
            if isinstance(notice, Ask):
                self._receiver.refused(RefuseReason.DRAINING, "internal error")
            elif isinstance(notice, Verified):
                self._receiver.not_adopted("internal error")
            self._fail(fault)

    async def _ask(self, offer: Offer) -> None:
        chosen = await choose(offer, self._readers, self._store)
        if chosen is None:
            names = ", ".join(reader.name for reader in self._readers)
            self._receiver.refused(RefuseReason.MISMATCH, f"no transport in common; ours: {names}")
            return
        transport, self._source = chosen
        answer = await self._intake.reserve(offer)
        if isinstance(answer, RefuseReason):
            answer = Refusal(answer)
        if isinstance(answer, Refusal):
            self._receiver.refused(answer.reason, answer.message, answer.retry_after_s)
            return
        self._offer, self._blocks = offer, answer.blocks
        self._granted_at = self._clock()
        self._receiver.reserved(answer.num_present, transport, self._granted_at)

    # The link.

    async def _read(self) -> None:
        try:
            while True:
                self._receiver.receive(await self._link.receive(), self._clock())
                self._changed()
                while self._receiver.arrivals.num_waiting >= MAX_WAITING_BATCHES * self._batch:
                    self._room.clear()
                    await self._room.wait()
        except (LinkLost, RemoteProtocolError) as end:
            if isinstance(end, RemoteProtocolError):  # A peer that breaks the contract is as good as lost.
                self._refusals.add(Refused.MALFORMED)
            self._is_lost = True
            self._receiver.lost()
            self._changed()

    async def _write(self) -> None:
        try:
            while True:
                message = self._receiver.next_output()
                self._is_sending = message is not None
                if message is not None:
                    await self._link.send(message)
                    continue
                if self._receiver.is_over:
                    self._wake.set()
                self._outputs.clear()
                await self._outputs.wait()
        except LinkLost:
            self._is_sending = False  # Reading finds the end, behind what P has said before it.

    # The bytes.

    @property
    def _batch(self) -> int:
        """How many blocks are placed at a time."""
        return 1 if self._source is None else max(1, self._source.batch_bytes // self._store.layout.block_bytes)

    async def _place(self) -> None:
        block_bytes = self._store.layout.block_bytes
        while True:
            frames = self._receiver.take_frames(self._batch)
            if not frames:
                self._frames.clear()
                await self._frames.wait()
                continue
            try:
                are_right = await to_the_end(self._place_all(frames), lambda: None)
            except Exception as fault:
                self._fail(fault)
                are_right = [False] * len(frames)
            self.num_bytes += len(frames) * block_bytes
            for frame, is_right in zip(frames, are_right, strict=True):
                self._receiver.placed(frame.index, is_right)
            self._changed()

    async def _place_all(self, frames: Sequence[Frame]) -> list[bool]:
        """Copies payloads into their blocks, then checks what the blocks now hold."""
        assert self._source is not None
        assert self._offer is not None
        blocks = [self._blocks[frame.index] for frame in frames]
        hashes = [self._offer.hashes[frame.index] for frame in frames]
        are_placed = await self._source.place([frame.payload for frame in frames], blocks, self._store)
        num_bytes = len(frames) * self._store.layout.block_bytes
        sums = await off_loop(functools.partial(self._sums.of, blocks, hashes), num_bytes)
        return [
            is_placed and total == frame.checksum
            for frame, is_placed, total in zip(frames, are_placed, sums, strict=True)
        ]
