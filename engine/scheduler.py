"""What the next step computes: continuous batching with chunked prefill and preemption by recompute.

``Scheduler.decide`` looks and returns a value; it changes nothing. In one step

    1. every running sequence with one token to go (a decode) gets that token,
    2. running prompts get chunks of what is left of the token budget,
    3. waiting sequences are admitted, each with the blocks of all its tokens.

Why it always progresses: blocks are secured in rank order, and a sequence that lacks one takes it from the last in
rank, never from one before it. So the first in rank lacks blocks only when held prompts and reservations have them,
which end from outside; alone on the engine it fits to its end (``engine.rules.check_request``). A sequence with nobody
behind it waits with its blocks instead of preempting itself, and nobody is admitted in a step in which somebody lacks a
block.

Held prompts are never preempted: their first blocks may be on their way to another worker. They need no victim either,
since they got all their blocks at once and do not grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.facts import EngineFacts
from engine.sequence import Running, Waiting, num_blocks_for
from proto.ids import BlockHash, BlockId


class BlockView(Protocol):
    """What a decision may know of the memory."""

    @property
    def num_free(self) -> int: ...

    def num_refs(self, block: BlockId) -> int: ...

    def match(self, hashes: Sequence[BlockHash]) -> tuple[BlockId, ...]: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """``long_prefill_token_threshold`` 0: a chunk is bounded by the step's budget alone."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True

    @classmethod
    def of(cls, facts: EngineFacts, *, enable_chunked_prefill: bool) -> SchedulerLimits:
        return cls(
            block_size=facts.block_size,
            max_num_seqs=facts.max_num_seqs,
            max_num_batched_tokens=facts.max_num_batched_tokens,
            long_prefill_token_threshold=facts.long_prefill_token_threshold,
            enable_chunked_prefill=enable_chunked_prefill,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``num_tokens`` of a running sequence, after it got ``num_new_blocks`` more. ``copies_last``: the block it
    writes first is shared, so its last new block becomes a copy of that."""

    sequence: Running
    num_tokens: int
    num_new_blocks: int
    copies_last: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """Start a waiting sequence: pin ``matched``, allocate ``num_new_blocks``, compute ``num_tokens``."""

    waiting: Waiting
    matched: tuple[BlockId, ...]
    num_new_blocks: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's decision. Apply preemptions first, then pin every match, then allocate in order.

    ``is_full``: somebody is left out for want of blocks or a seat, so no room should be promised to newcomers.
    """

    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...]
    preemptions: tuple[Running, ...]
    is_full: bool

    @property
    def is_empty(self) -> bool:
        return not (self.chunks or self.admissions or self.preemptions)


class Scheduler:
    """The policy. Its order is its callers': ranks carry priority and arrival."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits

    def decide(
        self, running: Sequence[Running], waiting: Iterable[Waiting], blocks: BlockView, num_seats_taken: int = 0
    ) -> Schedule:
        """``waiting`` is in rank order. ``num_seats_taken``: sequences promised to others, counted in max_num_seqs."""
        step = _Step(self._limits, blocks, running)
        step.continue_running()
        if not step.is_full:
            step.admit(waiting, num_seats_taken)
        return Schedule(tuple(step.chunks), tuple(step.admissions), tuple(step.preemptions), step.is_full)


class _Step:
    """One decision in the making."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockView, running: Sequence[Running]) -> None:
        self._limits = limits
        self._view = blocks
        self._ledger = _Ledger(blocks)
        self._running = sorted(running, key=lambda sequence: sequence.rank)
        num_decodes = sum(sequence.num_remaining == 1 for sequence in self._running)
        self._decode_budget = min(num_decodes, limits.max_num_batched_tokens)
        self._prefill_budget = limits.max_num_batched_tokens - self._decode_budget
        self.chunks: list[Chunk] = []
        self.admissions: list[Admission] = []
        self.preemptions: list[Running] = []
        self.is_full = False

    def continue_running(self) -> None:
        victims = [sequence for sequence in self._running if not sequence.track.is_held]
        preempted: set[Running] = set()
        for sequence in self._running:
            if sequence in preempted:
                continue
            num_tokens = self._num_tokens(sequence.num_remaining)
            if num_tokens == 0:
                continue
            needed = self._blocks_needed(sequence, num_tokens)
            while needed > self._ledger.num_free and victims and victims[-1].rank > sequence.rank:
                victim = victims.pop()
                preempted.add(victim)
                self._ledger.drop(victim.blocks)
                self.preemptions.append(victim)
                self.is_full = True
                needed = self._blocks_needed(sequence, num_tokens)
            if needed > self._ledger.num_free:
                self.is_full = True
                continue
            self._continue(sequence, num_tokens, needed)

    def admit(self, waiting: Iterable[Waiting], num_seats_taken: int) -> None:
        limits, size = self._limits, self._limits.block_size
        num_seats = num_seats_taken + sum(len(sequence.track.choices) for sequence in self._running)
        num_growing = sum(len(sequence.track.choices) for sequence in self._running if not sequence.track.is_held)
        in_flight = self._hashes_in_flight()
        num_deferred = 0
        for candidate in waiting:
            track = candidate.track
            if num_seats + len(track.choices) > limits.max_num_seqs:
                self.is_full = True
                return
            # At least the last token is computed, because its logits are needed.
            matched = self._view.match(track.hashes[: (len(track) - 1) // size])
            num_remaining = len(track) - len(matched) * size
            if self._waits_for_prefix(track.hashes[len(matched) :], num_remaining, in_flight):
                num_deferred += 1
                if num_deferred > limits.max_num_seqs:  # A long queue of twins is not searched to its end.
                    return
                continue
            num_tokens = self._num_tokens(num_remaining, is_new=True)
            if num_tokens == 0:
                return
            num_new_blocks = num_blocks_for(len(track), size) - len(matched)
            # Whoever runs will want its next block soon; taking the last ones would only preempt the newcomer again.
            num_wanted = num_new_blocks + self._ledger.cost_of_pinning(matched) + num_growing
            if num_wanted > self._ledger.num_free:
                self.is_full = True
                return
            self._ledger.pin(matched)
            self._ledger.take(num_new_blocks)
            self.admissions.append(Admission(candidate, matched, num_new_blocks, num_tokens))
            num_seats += len(track.choices)
            num_growing += 0 if track.is_held else len(track.choices)
            in_flight.update(track.hashes[len(matched) :])

    def _num_tokens(self, num_remaining: int, *, is_new: bool = False) -> int:
        """How many tokens of a sequence fit into what is left of the budget, which it then has used."""
        limits = self._limits
        if num_remaining == 1 and not is_new:
            num_tokens = min(1, self._decode_budget)
            self._decode_budget -= num_tokens
            return num_tokens
        num_tokens = min(num_remaining, self._prefill_budget)
        if not limits.enable_chunked_prefill:
            num_tokens = num_tokens if num_tokens == num_remaining else 0
        elif limits.long_prefill_token_threshold > 0:
            num_tokens = min(num_tokens, limits.long_prefill_token_threshold)
        self._prefill_budget -= num_tokens
        return num_tokens

    def _blocks_needed(self, sequence: Running, num_tokens: int) -> int:
        stop = sequence.num_scheduled + num_tokens
        copies = self._writes_shared_block(sequence)
        return max(0, num_blocks_for(stop, self._limits.block_size) + copies - len(sequence.blocks))

    def _writes_shared_block(self, sequence: Running) -> bool:
        index, offset = divmod(sequence.num_scheduled, self._limits.block_size)
        return offset > 0 and self._ledger.num_refs(sequence.blocks[index]) > 1

    def _continue(self, sequence: Running, num_tokens: int, num_new_blocks: int) -> None:
        copies = self._writes_shared_block(sequence)
        self._ledger.take(num_new_blocks)
        if copies:
            self._ledger.drop([sequence.blocks[sequence.num_scheduled // self._limits.block_size]])
        self.chunks.append(Chunk(sequence, num_tokens, num_new_blocks, copies))

    def _hashes_in_flight(self) -> set[BlockHash]:
        """Names of the blocks that running prompts have yet to fill."""
        size = self._limits.block_size
        return {
            block_hash
            for sequence in self._running
            if sequence.num_remaining > 1
            for block_hash in sequence.track.hashes[sequence.num_computed // size :]
        }

    def _waits_for_prefix(self, wanted: Sequence[BlockHash], num_remaining: int, in_flight: set[BlockHash]) -> bool:
        """Whether half or more of what a newcomer would compute is being computed right now by another.

        Then it is cheaper to let it wait and take those blocks from the prefix cache. Whom it waits for is running, so
        the wait ends.
        """
        num_shared = 0
        for block_hash in wanted:
            if block_hash not in in_flight:
                break
            num_shared += 1
        return 2 * num_shared * self._limits.block_size >= num_remaining and num_shared > 0


class _Ledger:
    """The pool as it will be once the decisions so far are applied."""

    def __init__(self, view: BlockView) -> None:
        self._view = view
        self._change: dict[BlockId, int] = {}
        self.num_free = view.num_free

    def num_refs(self, block: BlockId) -> int:
        return self._view.num_refs(block) + self._change.get(block, 0)

    def take(self, num_blocks: int) -> None:
        self.num_free -= num_blocks

    def drop(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            self._change[block] = self._change.get(block, 0) - 1
            self.num_free += self.num_refs(block) == 0

    def cost_of_pinning(self, blocks: Iterable[BlockId]) -> int:
        return sum(self.num_refs(block) == 0 for block in blocks)

    def pin(self, blocks: Iterable[BlockId]) -> None:
        self.num_free -= self.cost_of_pinning(blocks)
        for block in blocks:
            self._change[block] = self._change.get(block, 0) + 1
