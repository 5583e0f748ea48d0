"""Drives the prefill side of one hand-off: a Sender, its links, its timer, and the bytes.

    steer   deadlines and notices, one at a time, until RELEASED
    line    per decode worker: connect, then read and write at once; the link's own flow control paces the writing

Call everything on the event loop's thread. Nothing here waits for the engine, or makes it wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from kvtransfer.fences import Refusals, Refused
from kvtransfer.intake import PEER_LOST, SendEvents
from kvtransfer.sender import Delivered, Granted, Held, Notice, Outbox, Released, SendBlock, Sender
from kvtransfer.states import SendState
from kvtransfer.sums import block_sums
from kvtransfer.tasks import off_loop, stop, to_the_end, wait_until
from kvtransfer.transport import BlockStore, Link, LinkLost
from kvtransfer.transports import Payload, PayloadWriter, writer
from proto.control import Peer
from proto.errors import LocalProtocolError, RemoteProtocolError
from proto.handoff import Fence, Frame, HandoffMessage, Offer, SealedChoice
from proto.ids import BlockId, Generation

Connect = Callable[[Peer], Awaitable[Link]]

CONNECT_S = 5.0
"""How long a decode worker may take to answer a connection before it counts as lost."""
FAREWELL_S = 3.0
"""How long the last words (a Withdraw) may take."""


class SendSession:
    """Hands the blocks of one prompt to ``peer``, or to those it is redirected to.

    Until ``events.released()`` the blocks named by ``blocks_ready`` must stay as they are; after it nothing reads them.
    ``rto_s`` only where the link loses messages.
    """

    def __init__(
        self,
        offer: Offer,
        store: BlockStore,
        connect: Connect,
        peer: Peer,
        events: SendEvents,
        *,
        refusals: Refusals | None = None,
        rto_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_bytes = 0
        """Payload bytes handed over (sent again ones included, wherever they lie), to all decode workers together."""
        self.retry_after_s: float | None = None
        """The hint of the last refusal."""
        self.refusals = Refusals() if refusals is None else refusals
        self._store = store
        self._connect = connect
        self._peer = peer
        self._events = events
        self._clock = clock
        self._sender = Sender(offer, self.refusals, clock(), rto_s=rto_s)
        self._blocks = _Blocks(store, offer)
        self._wake = asyncio.Event()
        self._lines: dict[asyncio.Task[None], _Line] = {}
        self._notices: deque[Notice] = deque()
        self._bytes_before = 0
        self._granted_at = clock()
        self._has_started = False
        self._fault: BaseException | None = None

    @property
    def state(self) -> SendState:
        return self._sender.state

    @property
    def fence(self) -> Fence:
        return self._sender.fence

    @property
    def num_resent(self) -> int:
        return self._sender.num_resent

    # What the tier asks for. After the release all of it does nothing: the news may still be on its way.

    def blocks_ready(self, first_index: int, blocks: Sequence[BlockId]) -> None:
        """The next blocks are computed; they are sent at once where there is room for them."""
        if self._sender.is_released:
            return
        if first_index != len(self._blocks):
            raise LocalProtocolError(f"block {first_index} became ready after block {len(self._blocks) - 1}")
        self._blocks.add(blocks)
        self._sender.blocks_ready(len(self._blocks), self._clock())
        self._changed()

    def seal(self, num_blocks: int, num_tokens_last: int, choices: Sequence[SealedChoice]) -> None:
        """Every block is ready, the last one's tail is zero, and the first token of every choice is known."""
        if self._sender.is_released:
            return
        if num_blocks != len(self._blocks):
            raise LocalProtocolError(f"sealed {num_blocks} blocks of {len(self._blocks)}")
        self._sender.seal(num_tokens_last, tuple(choices), self._clock())
        self._changed()

    def redirect(self, generation: Generation, peer: Peer) -> bool:
        """Offers the blocks to another decode worker. False where the blocks are gone, or a newer try is on."""
        if self._sender.is_released or generation <= self.fence.generation:
            return False
        self._peer = peer
        self._sender.redirect(generation, peer.epoch, self._clock())
        if self._has_started:
            self._open_line()
        self._changed()
        return True

    def withdraw(self, reason: str) -> None:
        """Aborted, or finished at its first token."""
        self._sender.withdraw(reason)
        self._changed()

    def renew(self, lease_s: float) -> None:
        self._sender.renew(lease_s, self._clock())
        self._changed()

    async def run(self) -> None:
        """Returns once the blocks are released. Cancelled, it releases them first.

        An error of ours on the way to one decode worker would meet the next one as well: it ends the session, and is
        raised once the blocks are released.
        """
        await to_the_end(self._steer(), lambda: self.withdraw("cancelled"))

    # Steering.

    async def _steer(self) -> None:
        try:
            self._has_started = True
            if not self._sender.is_released:
                if self._sender.state is SendState.HELD:
                    self._sender.offer(self._clock())
                self._open_line()
            while not self._sender.is_released:
                if self._fault is not None:
                    raise self._fault
                self._sender.tick(self._clock())
                self._stir()
                await self._tell()
                if not self._sender.is_released:
                    await wait_until(self._wake, self._sender.deadline(), self._clock)
        finally:
            self._sender.withdraw("the session has failed")
            await self._tell()
            await self._hang_up()
        if self._fault is not None:  # met while the last words were said
            raise self._fault

    async def _tell(self) -> None:
        """Passes on what has happened."""
        self._notices.extend(self._sender.take_notices())
        while self._notices:
            match self._notices.popleft():
                case Granted(num_present=num_present, transport=transport):
                    self._granted_at, self._bytes_before = self._clock(), self.num_bytes
                    self._events.granted(num_present, transport)
                case Held(reason=reason, message=message, retry_after_s=retry_after_s):
                    self.retry_after_s = retry_after_s
                    self._events.held(reason or PEER_LOST, message)
                case Delivered():
                    self._events.adopted(self.num_bytes - self._bytes_before, self._clock() - self._granted_at)
                case Released():
                    await self._blocks.finish()
                    self._events.released()

    async def _hang_up(self) -> None:
        """Last words get their time; then the links are cut."""
        self._changed()
        if self._lines:
            await asyncio.wait(tuple(self._lines), timeout=FAREWELL_S)
        await stop(*self._lines)

    def _changed(self) -> None:
        self._wake.set()
        self._stir()

    def _stir(self) -> None:
        for line in self._lines.values():
            if line.outbox or line.outbox.is_closed:
                line.ready.set()

    # Lines.

    def _open_line(self) -> None:
        line = _Line(self._sender.outbox, self._peer)
        task = asyncio.create_task(self._run_line(line))
        self._lines[task] = line
        task.add_done_callback(self._line_ended)

    def _line_ended(self, task: asyncio.Task[None]) -> None:
        line = self._lines.pop(task)
        fault = None if task.cancelled() else task.exception()
        if fault is None:
            self._sender.lost(line.outbox.fence)
        self._fault = self._fault or fault
        self._changed()

    async def _run_line(self, line: _Line) -> None:
        """Ends when the link is lost, or when all is said."""
        try:
            async with asyncio.timeout(CONNECT_S):
                link = await self._connect(line.peer)
        except (LinkLost, OSError):  # a TimeoutError is one
            return
        tasks = [asyncio.create_task(self._read(link, line)), asyncio.create_task(self._write(link, line))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await link.close()
            await stop(*tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _read(self, link: Link, line: _Line) -> None:
        try:
            while True:
                message = await link.receive()
                reply = self._sender.receive(message, self._clock())
                if reply is not None:
                    line.outbox.put(reply)
                self._changed()
        except RemoteProtocolError:
            self.refusals.add(Refused.MALFORMED)  # A peer that breaks the contract is as good as lost.
        except LinkLost:
            return

    async def _write(self, link: Link, line: _Line) -> None:
        outbox = line.outbox
        try:
            while outbox or not outbox.is_closed:
                item = outbox.next(self._clock())
                if item is None:
                    self._wake.set()  # The next deadline counts from now.
                    line.ready.clear()
                    await line.ready.wait()
                    continue
                message = await self._frame(line, item) if isinstance(item, SendBlock) else item
                if message is not None:
                    await link.send(message)
        except LinkLost:
            return

    async def _frame(self, line: _Line, block: SendBlock) -> HandoffMessage | None:
        """None where the try ended while the checksum was computed, or the block was read."""
        checksum = await self._blocks.sum(block.index)
        transport = self._sender.transport
        if line.outbox.is_closed or transport is None:
            return None
        if line.writer is None:
            line.writer = writer(transport, self._store)
        payload = await self._payload(line, line.writer, block.index)
        if line.outbox.is_closed or payload is None:
            return None
        self.num_bytes += self._store.layout.block_bytes
        return Frame(line.outbox.fence, block.index, checksum, payload)

    async def _payload(self, line: _Line, writer: PayloadWriter, index: int) -> Payload | None:
        """With those that come right behind it, where the writer takes several at once. None after the release."""
        if index not in line.ahead:
            most = max(1, writer.batch_bytes // self._store.layout.block_bytes)
            indices = [index, *(block.index for block in line.outbox.upcoming(most - 1))]
            line.ahead = await self._blocks.payloads(writer, indices)
        return line.ahead.pop(index, None)


class _Line:
    """The way to one decode worker, under one fence."""

    def __init__(self, outbox: Outbox, peer: Peer) -> None:
        self.outbox = outbox
        self.peer = peer
        self.ready = asyncio.Event()
        self.writer: PayloadWriter | None = None
        self.ahead: dict[int, Payload] = {}
        """Of the blocks that come next."""


class _Blocks:
    """The blocks that are ready, their checksums, and what frames carry for them.

    Each checksum is computed once, while the block is surely ours: a block that is sent again late must not be vouched
    for with bytes that have come after it.
    """

    def __init__(self, store: BlockStore, offer: Offer) -> None:
        self._block_bytes = store.layout.block_bytes
        self._hashes = offer.hashes
        self._summer = block_sums(store)
        self._blocks: list[BlockId] = []
        self._sums: dict[int, int] = {}
        self._in_use = asyncio.Lock()
        self._is_finished = False

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, blocks: Sequence[BlockId]) -> None:
        self._blocks.extend(blocks)

    async def sum(self, index: int) -> int:
        """The checksum of a block; those after it are computed with it, a batch at a time."""
        async with self._in_use:
            if index not in self._sums and not self._is_finished:
                end = min(len(self._blocks), index + max(1, self._summer.batch_bytes // self._block_bytes))
                wanted = [each for each in range(index, end) if each not in self._sums]
                self._sums |= await off_loop(lambda: self._compute(wanted), len(wanted) * self._block_bytes)
            return self._sums.get(index, 0)

    async def payloads(self, writer: PayloadWriter, indices: Sequence[int]) -> dict[int, Payload]:
        """Of each block; of none once nothing may read them."""
        async with self._in_use:
            if self._is_finished:
                return {}
            return dict(zip(indices, await writer.payloads([self._blocks[index] for index in indices]), strict=True))

    async def finish(self) -> None:
        """Returns when nothing reads the blocks, and nothing ever will."""
        self._is_finished = True
        async with self._in_use:
            return

    def _compute(self, indices: Sequence[int]) -> dict[int, int]:
        blocks, hashes = [self._blocks[index] for index in indices], [self._hashes[index] for index in indices]
        return dict(zip(indices, self._summer.of(blocks, hashes), strict=True))
