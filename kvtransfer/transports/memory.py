"""Links within one process: the transport of in-process stacks, and of tests.

Payloads stay views of P's memory until D copies them. A direction may be given ``Faults``, which lose, delay, repeat,
reorder and damage what passes; without them a link is as reliable as a socket.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from kvtransfer.transport import Link, LinkLost
from proto.control import Peer
from proto.handoff import Frame, HandoffMessage, Located

CAPACITY = 16
"""Messages on their way in one direction before ``send`` waits."""

Fault = Callable[[HandoffMessage], Sequence[HandoffMessage]]
"""What arrives when a message is sent: itself, nothing, several, or others that were held back before."""


class Faults:
    """Mischief in one direction, drawn from ``rng``; each number is a message's chance to suffer it."""

    def __init__(
        self, rng: random.Random, *, drop: float = 0.0, duplicate: float = 0.0, delay: float = 0.0, corrupt: float = 0.0
    ) -> None:
        self._rng = rng
        self._drop, self._duplicate, self._delay, self._corrupt = drop, duplicate, delay, corrupt
        self._held: list[HandoffMessage] = []

    def __call__(self, message: HandoffMessage) -> Sequence[HandoffMessage]:
        arriving = [] if self._happens(self._drop) else [message]
        if self._happens(self._duplicate):
            arriving.append(message)
        arriving = [self._damaged(each) if self._happens(self._corrupt) else each for each in arriving]
        if self._happens(self._delay):
            self._held += arriving
            return ()
        if self._held and self._happens(0.5):
            # Held messages come behind newer ones, in any order.
            self._rng.shuffle(self._held)
            arriving, self._held = arriving + self._held, []
        return arriving

    def heal(self) -> None:
        """No more mischief. What is held back arrives with the next message."""
        self._drop = self._duplicate = self._delay = self._corrupt = 0.0

    def _happens(self, chance: float) -> bool:
        return self._rng.random() < chance

    def _damaged(self, message: HandoffMessage) -> HandoffMessage:
        if not isinstance(message, Frame) or isinstance(message.payload, Located):
            return message
        payload = bytearray(message.payload)
        payload[self._rng.randrange(len(payload))] ^= 1 << self._rng.randrange(8)
        return replace(message, payload=bytes(payload))


def pair(
    capacity: int = CAPACITY, *, forth: Fault | None = None, back: Fault | None = None
) -> tuple[MemoryLink, MemoryLink]:
    """Two ends of one link. ``forth`` meddles with what the first sends, ``back`` with what the second does."""
    there, here = _Pipe(capacity, forth), _Pipe(capacity, back)
    return MemoryLink(here, there), MemoryLink(there, here)


class _Pipe:
    """One direction. Closed by the reader, it loses everything; by the writer, what was sent still arrives."""

    def __init__(self, capacity: int, fault: Fault | None) -> None:
        self._capacity = capacity
        self._fault = fault
        self._messages: deque[HandoffMessage] = deque()
        self._is_closed = False
        self._changed = asyncio.Condition()

    async def put(self, message: HandoffMessage) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closed or len(self._messages) < self._capacity)
            if self._is_closed:
                raise LinkLost("the link is closed")
            self._messages.extend((message,) if self._fault is None else self._fault(message))
            self._changed.notify_all()

    async def get(self) -> HandoffMessage:
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closed or bool(self._messages))
            if not self._messages:
                raise LinkLost("the link is closed")
            self._changed.notify_all()
            return self._messages.popleft()

    async def close(self, *, lose: bool) -> None:
        async with self._changed:
            self._is_closed = True
            if lose:
                self._messages.clear()
            self._changed.notify_all()


class MemoryLink:
    """One end. Only for one event loop."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def send(self, message: HandoffMessage) -> None:
        await self._outgoing.put(message)

    async def receive(self) -> HandoffMessage:
        return await self._incoming.get()

    async def close(self) -> None:
        await self._incoming.close(lose=True)
        await self._outgoing.close(lose=False)


class MemoryNetwork:
    """Workers of one process, by address: what gRPC's servers and channels are between processes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._workers: dict[str, Callable[[Link], Awaitable[None]]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    def serve(self, address: str, on_link: Callable[[Link], Awaitable[None]]) -> None:
        """``on_link`` serves each link that comes to ``address``, in a task of its own."""
        self._workers[address] = on_link

    def forget(self, address: str) -> None:
        self._workers.pop(address, None)

    async def connect(self, peer: Peer) -> Link:
        """Raises LinkLost where nobody serves the peer's address."""
        on_link = self._workers.get(peer.address)
        if on_link is None:
            raise LinkLost(f"nobody serves {peer.address}")
        ours, theirs = pair(self._capacity)
        task = asyncio.ensure_future(self._run(on_link, theirs))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return ours

    async def drain(self) -> None:
        """Waits until no link is served any more. Raises what serving one raised."""
        while self._serving:
            await asyncio.gather(*self._serving)

    async def _run(self, on_link: Callable[[Link], Awaitable[None]], link: Link) -> None:
        try:
            await on_link(link)
        finally:
            await link.close()
