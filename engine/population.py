"""Who lives on an engine, in which stage of life, and which blocks they own.

Makes the moves between the stages of ``engine.sequence``, and with each of them moves the blocks: whatever happens to a
sequence, its references are given back exactly once. Decides nothing and computes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.prefix_cache import PrefixCache
from engine.scheduler import Admission
from engine.sequence import Held, Reservation, Reserved, Running, Track, Waiting, num_blocks_for
from engine.waiting import WaitingQueue
from proto.errors import LocalProtocolError
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId, RequestId


@dataclass(slots=True)
class Known:
    """A request the engine answers for. ``num_sequences`` counts its waiting and running ones; ``num_cached`` prompt
    tokens that were not computed here because the prefix cache had them."""

    num_sequences: int = 0
    num_cached: int = 0
    is_started: bool = False


class Population:
    """All sequences of one engine, and the cache they take blocks from."""

    def __init__(self, cache: PrefixCache, hasher: BlockHasher) -> None:
        self.cache = cache
        self.waiting = WaitingQueue()
        self.running: list[Running] = []
        self.held: dict[RequestId, Held] = {}
        self.reserved: dict[RequestId, Reserved] = {}
        self.known: dict[RequestId, Known] = {}
        # Over, but a step that was submitted still writes their blocks.
        self.leaving: set[Running] = set()
        self._hasher = hasher
        self._block_size = hasher.block_size

    @property
    def num_reserved_seats(self) -> int:
        return sum(len(room.growth) for room in self.reserved.values())

    @property
    def num_growing(self) -> int:
        """Running choices that will want more blocks."""
        return sum(len(sequence.track.choices) for sequence in self.running if not sequence.track.is_held)

    @property
    def num_running_seats(self) -> int:
        return sum(len(sequence.track.choices) for sequence in self.running)

    def count_soon_free(self) -> int:
        """Blocks that nobody has but sequences that are over, or end soon. Takes a look at each of their blocks."""
        refs: Counter[BlockId] = Counter()
        for sequence in (*self.leaving, *(each for each in self.running if each.ends_soon)):
            refs.update(sequence.blocks)
        return self.cache.num_without(refs)

    def running_of(self, request: RequestId) -> list[Running]:
        return [sequence for sequence in self.running if sequence.track.id == request]

    # -- waiting and running ----------------------------------------------------------------------------------------

    def introduce(self, request: RequestId) -> Known:
        """Makes the id known. Raises LocalProtocolError if it is already."""
        if request in self.known:
            raise LocalProtocolError(f"request {request} is on this engine already")
        known = self.known[request] = Known()
        return known

    def enqueue(self, track: Track, *, is_urgent: bool) -> None:
        """A new sequence of a known request."""
        self.known[track.id].num_sequences += 1
        self._wait(track, is_urgent=is_urgent)

    def admit(self, admission: Admission) -> Running:
        """The waiting sequence runs, with blocks for all its tokens. Its match is pinned already."""
        track = admission.waiting.track
        self.waiting.remove(admission.waiting)
        blocks = [*admission.matched, *self.cache.allocate(admission.num_new_blocks)]
        num_matched = len(admission.matched)
        sequence = Running(track, blocks, num_matched * self._block_size, num_cached=num_matched)
        self.running.append(sequence)
        return sequence

    def preempt(self, sequence: Running) -> None:
        """Back to waiting, ahead of new work, with its tokens and without its blocks."""
        assert not sequence.track.is_held, "a held prompt's blocks may be on their way already"
        assert not sequence.num_in_flight, "its tokens are not all known"
        self._stop(sequence)
        self._wait(sequence.track, is_urgent=True)

    def unshare(self, sequence: Running) -> tuple[BlockId, BlockId]:
        """Replaces the shared block that is written next by the sequence's last new one: (copy from, copy to)."""
        index = sequence.num_computed // self._block_size
        source, copy = sequence.blocks[index], sequence.blocks.pop()
        sequence.blocks[index] = copy
        self.cache.release([source])
        return source, copy

    def cache_full_blocks(self, sequence: Running) -> None:
        """Offers the blocks that became full to the prefix cache."""
        if not self.cache.is_enabled:
            return
        num_full = sequence.num_computed // self._block_size
        track = sequence.track
        track.extend_hashes(self._hasher, num_full)
        for index in range(sequence.num_cached, num_full):
            self.cache.insert(track.hashes[index], sequence.blocks[index])
        sequence.num_cached = num_full

    def finish(self, sequence: Running) -> None:
        """The sequence's last token is made, or nobody wants another."""
        self._stop(sequence)
        self._forget_sequence(sequence.track.id)

    def land(self, sequence: Running, num_tokens: int) -> bool:
        """A step that computed ``num_tokens`` of the sequence is done with its blocks. Whether it is still running."""
        sequence.num_in_flight -= num_tokens
        if sequence not in self.leaving:
            return True
        if sequence.num_in_flight == 0:
            self.leaving.remove(sequence)
            self.cache.release(sequence.blocks)
        return False

    def fork(self, sequence: Running, tracks: Sequence[Track]) -> None:
        """A computed prompt's choices go on by themselves, sharing its blocks."""
        assert not sequence.num_in_flight, "its blocks are being written"
        self.running.remove(sequence)
        self._branch(tracks, sequence.blocks, sequence.num_computed, [()] * len(tracks))
        self._forget_sequence(sequence.track.id)

    def fail(self, request: RequestId) -> None:
        """Ends all choices of a request whose KV is not to be trusted: nobody is to match it. What was announced stays
        until release(), since somebody may be reading it."""
        for waiting in self.waiting.of(request):
            self.drop_waiting(waiting)
        for sequence in self.running_of(request):
            self.cache.forget(sequence.blocks)
            if sequence.num_announced > 0:
                self.hold(sequence)
            else:
                self.finish(sequence)

    def drop_waiting(self, waiting: Waiting) -> None:
        self.waiting.remove(waiting)
        self._forget_sequence(waiting.track.id)

    # -- held -------------------------------------------------------------------------------------------------------

    def hold(self, sequence: Running) -> None:
        """The prompt is computed; its blocks stay until release()."""
        assert not sequence.num_in_flight, "its blocks are being written"
        self.running.remove(sequence)
        request = sequence.track.id
        self.held[request] = Held(request, tuple(sequence.blocks))
        self.known[request].num_sequences -= 1

    def release(self, request: RequestId) -> None:
        """Ends a hold; full blocks stay cached. Nothing happens where there is none."""
        held = self.held.pop(request, None)
        if held is not None:
            self.cache.release(held.blocks)
            del self.known[request]

    # -- reserved ---------------------------------------------------------------------------------------------------

    def reserve(
        self, request: RequestId, matched: tuple[BlockId, ...], hashes: Sequence[BlockHash], num_tokens: int, n: int
    ) -> Reservation:
        """Pins ``matched``, and takes the blocks of the rest of the prompt and one more per choice."""
        known = self.introduce(request)
        known.num_cached = min(len(matched) * self._block_size, num_tokens)
        known.is_started = True
        self.cache.pin(matched)
        fresh = self.cache.allocate(len(hashes) - len(matched))
        reservation = Reservation(request, (*matched, *fresh), len(matched))
        growth = tuple(self.cache.allocate(n))
        self.reserved[request] = Reserved(reservation, growth, tuple(hashes), num_tokens)
        return reservation

    def adopt(self, room: Reserved, tracks: Sequence[Track]) -> None:
        """The reserved blocks hold the prompt: ``tracks`` run on it. Without any, all is released."""
        reservation = room.reservation
        del self.reserved[reservation.request]
        self._cache_reserved(room, room.num_tokens // self._block_size)
        growth = [(block,) for block in room.growth]
        self.cache.release(room.growth[len(tracks) :])
        self.known[reservation.request].num_sequences += 1  # The prompt itself, until its choices are counted.
        self._branch(tracks, reservation.blocks, room.num_tokens, growth[: len(tracks)])
        self._forget_sequence(reservation.request)

    def cancel(self, request: RequestId, num_verified: int) -> None:
        """Drops a reservation, but keeps the leading ``num_verified`` blocks cached as far as they are full."""
        room = self.reserved.pop(request, None)
        if room is not None:
            self._cache_reserved(room, min(num_verified, room.num_tokens // self._block_size))
            self.cache.release(room.growth)
            self.cache.release(room.reservation.blocks)
            del self.known[request]

    # -- the moves they are made of ---------------------------------------------------------------------------------

    def _wait(self, track: Track, *, is_urgent: bool) -> None:
        if self.cache.is_enabled:
            track.extend_hashes(self._hasher, len(track) // self._block_size)
        self.waiting.add(Waiting(track, is_urgent))

    def _stop(self, sequence: Running) -> None:
        self.running.remove(sequence)
        if sequence.num_in_flight:
            self.leaving.add(sequence)
        else:
            self.cache.release(sequence.blocks)

    def _branch(
        self, tracks: Sequence[Track], blocks: Sequence[BlockId], num_computed: int, growth: Sequence[Sequence[BlockId]]
    ) -> None:
        """Hands one reference to ``blocks`` over to ``tracks``, each of which gets one of its own."""
        for index, track in enumerate(tracks):
            if index > 0:
                self.cache.pin(blocks)
            num_cached = min(len(track.hashes), num_computed // self._block_size)
            self.running.append(Running(track, [*blocks, *growth[index]], num_computed, num_cached))
            self.known[track.id].num_sequences += 1
        if not tracks:
            self.cache.release(blocks)

    def _cache_reserved(self, room: Reserved, num_blocks: int) -> None:
        for block_hash, block in zip(room.hashes[:num_blocks], room.reservation.blocks, strict=False):
            self.cache.insert(block_hash, block)

    def _forget_sequence(self, request: RequestId) -> None:
        known = self.known[request]
        known.num_sequences -= 1
        if known.num_sequences == 0:
            del self.known[request]

    # -- checks -----------------------------------------------------------------------------------------------------

    def references(self) -> Iterable[BlockId]:
        """Every reference to a block that somebody has, with repetition."""
        for sequence in (*self.running, *self.leaving):
            yield from sequence.blocks
        for held in self.held.values():
            yield from held.blocks
        for room in self.reserved.values():
            yield from room.reservation.blocks
            yield from room.growth

    def check_integrity(self) -> None:
        """Recomputes from scratch what the counts and indices of every part should be."""
        self.cache.check_integrity(list(self.references()))
        self.waiting.check_integrity()
        counts = dict.fromkeys([*self.held, *self.reserved], 0)
        for track in [*(w.track for w in self.waiting), *(r.track for r in self.running)]:
            counts[track.id] = counts.get(track.id, 0) + 1
            tokens = track.tokens(0, len(track))
            assert track.hashes == self._hasher.full_blocks(tokens, track.request.cache_salt)[: len(track.hashes)]
        assert counts == {request: known.num_sequences for request, known in self.known.items()}
        assert all(sequence.num_in_flight > 0 and sequence not in self.running for sequence in self.leaving)
        for sequence in self.running:
            assert 0 <= sequence.num_computed < len(sequence.track)
            assert (
                len(set(sequence.blocks))
                == len(sequence.blocks)
                >= num_blocks_for(sequence.num_computed, self._block_size)
            )
            assert sequence.num_cached <= len(sequence.track.hashes)
