"""A tiny world for hand-offs: blocks whose content follows from their hash, memory, offers, and a decode tier."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvtransfer.intake import Refusal
from kvtransfer.integrity import BlockChecksum
from kvtransfer.transport import DeviceBlocks
from proto.handoff import Fence, Frame, Located, Offer, RefuseReason, Seal, SealedChoice, TransportOffer
from proto.ids import BlockHash, BlockId, Epoch, Generation, RequestId
from proto.layout import KvLayout, MemoryExport

LAYOUT = KvLayout(num_layers=1, block_size=4, kv_heads=1, head_dim=4, dtype="float16", model_digest="tiny")
SHARED_LAYOUT = KvLayout(num_layers=2, block_size=16, kv_heads=4, head_dim=32, dtype="float32", model_digest="shared")
BLOCK = LAYOUT.block_bytes
CHOICES = (SealedChoice(7),)


def block_hash(index: int, request: str = "r.1") -> BlockHash:
    return BlockHash(hashlib.blake2b(f"{request}/{index}".encode(), digest_size=16).digest())


def content(name: BlockHash, num_bytes: int = BLOCK) -> bytes:
    """What every block of that hash holds, wherever it was computed."""
    return hashlib.shake_256(name).digest(num_bytes)


def make_fence(generation: int = 1, *, request: str = "r.1", prefill: str = "p", decode: str = "d") -> Fence:
    return Fence(RequestId(request), Generation(generation), Epoch(prefill), Epoch(decode))


def make_offer(
    num_blocks: int = 3,
    *,
    fence: Fence | None = None,
    num_tokens: int | None = None,
    layout: KvLayout = LAYOUT,
    lease_s: float = 30.0,
    transports: Sequence[str | TransportOffer] = ("memory",),
) -> Offer:
    fence = fence or make_fence()
    return Offer(
        fence=fence,
        layout=layout.fingerprint(),
        layout_text=layout.describe(),
        numerics="numerics",
        num_tokens=num_tokens or num_blocks * layout.block_size,
        num_choices=1,
        hashes=tuple(block_hash(index, fence.request) for index in range(num_blocks)),
        transports=tuple(each if isinstance(each, TransportOffer) else TransportOffer(each) for each in transports),
        lease_s=lease_s,
    )


def make_frame(offer: Offer, index: int, *, payload: bytes | Located | None = None, layout: KvLayout = LAYOUT) -> Frame:
    right = content(offer.hashes[index], layout.block_bytes)
    checksum = BlockChecksum(layout.block_bytes).of(right, offer.hashes[index])
    return Frame(offer.fence, index, checksum, right if payload is None else payload)


def make_seal(offer: Offer, *, layout: KvLayout = LAYOUT) -> Seal:
    last = offer.num_tokens - (len(offer.hashes) - 1) * layout.block_size
    return Seal(offer.fence, len(offer.hashes), last, CHOICES)


class Store:
    """Blocks in a bytearray. ``writes`` counts them, by block."""

    def __init__(self, num_blocks: int, layout: KvLayout = LAYOUT) -> None:
        self.layout = layout
        self.writes: dict[int, int] = {}
        self._memory = memoryview(bytearray(num_blocks * layout.block_bytes))

    def read(self, block: BlockId) -> memoryview:
        start = block * self.layout.block_bytes
        return self._memory[start : start + self.layout.block_bytes].toreadonly()

    def write(self, block: BlockId, data: bytes | memoryview) -> None:
        start = block * self.layout.block_bytes
        self._memory[start : start + self.layout.block_bytes] = data
        self.writes[block] = self.writes.get(block, 0) + 1

    def export(self) -> MemoryExport | None:
        return None

    def on_device(self) -> DeviceBlocks | None:
        return None

    def fill(self, offer: Offer, first_block: int = 0) -> list[BlockId]:
        """Computes the prompt's blocks, at ``first_block`` and after."""
        blocks = [BlockId(first_block + index) for index in range(len(offer.hashes))]
        for block, name in zip(blocks, offer.hashes, strict=True):
            self.write(block, content(name, self.layout.block_bytes))
        return blocks


class SharedStore(Store):
    """Blocks in a memfd, with the nonce behind the last one: what a CPU engine exports."""

    NONCE = b"sixteen bytes ok"

    def __init__(self, num_blocks: int, layout: KvLayout) -> None:
        super().__init__(num_blocks, layout)
        self.fd = os.memfd_create("blocks")
        size = num_blocks * layout.block_bytes
        self._memory = memoryview(bytearray())
        os.ftruncate(self.fd, size + len(self.NONCE))
        self.mapped = mmap.mmap(self.fd, size + len(self.NONCE))
        self.mapped[size:] = self.NONCE
        self._memory = memoryview(self.mapped)
        self._export = MemoryExport(os.getpid(), self.fd, size + len(self.NONCE), size, self.NONCE)

    def export(self) -> MemoryExport:
        return self._export

    def close(self) -> None:
        self._memory.release()
        self.mapped.close()
        os.close(self.fd)


@dataclass(frozen=True)
class Room:
    blocks: tuple[BlockId, ...]
    num_present: int


@dataclass
class Tier:
    """A decode tier of one block range per request: grants ``answer``, and remembers what it was told."""

    store: Store
    first_block: int = 0
    num_present: int = 0
    answer: Refusal | RefuseReason | None = None
    told: list[str] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    freed_with: list[tuple[int, str]] = field(default_factory=list)
    num_bytes: int = 0
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    has_reserved: asyncio.Event = field(default_factory=asyncio.Event)
    may_adopt: asyncio.Event | None = None
    fault_in: str = ""

    async def reserve(self, offer: Offer) -> Room | Refusal | RefuseReason:
        self._tell("reserve")
        if self.answer is not None:
            return self.answer
        self.offers.append(offer)
        blocks = tuple(BlockId(self.first_block + index) for index in range(len(offer.hashes)))
        for block, name in zip(blocks[: self.num_present], offer.hashes, strict=False):
            self.store.write(block, content(name, self.store.layout.block_bytes))
        self.has_reserved.set()
        return Room(blocks, self.num_present)

    async def sealed(self, fence: Fence, seal: Seal) -> None:
        self._tell("sealed")

    async def adopted(self, fence: Fence, seal: Seal, num_bytes: int, duration_s: float) -> None:
        if self.may_adopt is not None:
            await self.may_adopt.wait()
        self._tell("adopted")
        self.num_bytes = num_bytes
        self.is_over.set()

    async def freed(self, fence: Fence, num_verified: int, reason: str) -> None:
        self._tell("freed")
        self.freed_with.append((num_verified, reason))
        self.is_over.set()

    def holds(self, offer: Offer) -> bool:
        """Whether the reserved blocks have the right content, all of them."""
        return all(
            bytes(self.store.read(BlockId(self.first_block + index))) == content(name, self.store.layout.block_bytes)
            for index, name in enumerate(offer.hashes)
        )

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if what == self.fault_in:
            raise RuntimeError(f"the tier fails in {what}")


@dataclass
class Ear:
    """A prefill tier that remembers what it was told, and can be waited for."""

    told: list[str] = field(default_factory=list)
    reasons: list[tuple[RefuseReason | str, str]] = field(default_factory=list)
    num_bytes: int = 0
    transport: str = ""
    num_present: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def granted(self, num_present: int, transport: str) -> None:
        self.transport, self.num_present = transport, num_present
        self._tell("granted")

    def held(self, reason: RefuseReason | str, message: str) -> None:
        self.reasons.append((reason, message))
        self._tell("held")

    def adopted(self, num_bytes: int, duration_s: float) -> None:
        self.num_bytes = num_bytes
        self._tell("adopted")

    def released(self) -> None:
        self._tell("released")

    async def until(self, what: str, times: int = 1) -> None:
        while self.told.count(what) < times:
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, what: str) -> None:
        self.told.append(what)
        self._changed.set()


def redirected(offer: Offer, generation: int, decode: str) -> Offer:
    return replace(offer, fence=offer.fence.redirected(Generation(generation), Epoch(decode)))
