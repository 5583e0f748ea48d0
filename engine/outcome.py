"""What a step's results make of the sequences that were computed: tokens, endings, forks, and blocks to announce.

Knows one step at a time. Moves sequences by ``engine.population``; decides nothing about the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.batch import Sampled
from engine.output import Filled
from engine.population import Population
from engine.rules import Ending
from engine.sequence import Running, Track
from proto.ids import BlockId, RequestId
from proto.request import TokenOut


class KvLike(Protocol):
    """The part of the KV memory that is not the runner's business."""

    def zero_tail(self, block: BlockId, num_valid_tokens: int) -> None: ...


class Outcome:
    """Applies one step's rows, one by one, and gathers what there is to tell."""

    def __init__(self, live: Population, kv: KvLike, block_size: int) -> None:
        self.tokens: list[TokenOut] = []
        self.filled: list[Filled] = []
        self.failed: list[RequestId] = []
        self.num_prompt_tokens = 0
        self._live = live
        self._kv = kv
        self._block_size = block_size

    def apply(self, sequence: Running, num_tokens: int, sampled: Sequence[Sampled]) -> None:
        """``num_tokens`` more of ``sequence`` are in KV, and ``sampled`` was drawn after them, if they are its last."""
        self.num_prompt_tokens += num_tokens if sequence.is_prefilling else 0
        sequence.num_computed += num_tokens
        self._live.cache_full_blocks(sequence)
        if sequence.track.is_held:
            self._advance_held(sequence, sampled)
        elif len(sampled) == 1:
            self._advance(sequence, sampled[0])
        elif sampled:
            self._fork(sequence, sampled)

    def fail(self, sequence: Running) -> None:
        """What was computed of ``sequence`` is no number: its request ends here, with all of its choices."""
        self.failed.append(sequence.track.id)
        self._live.fail(sequence.track.id)

    def _advance(self, sequence: Running, drawn: Sampled) -> None:
        track = sequence.track
        position = len(track.output)
        ending = track.append(drawn.token)
        self._tell(track, track.choices[0], position, drawn, ending)
        if ending is not None:
            self._live.finish(sequence)

    def _fork(self, sequence: Running, sampled: Sequence[Sampled]) -> None:
        """A prompt of several choices has the first token of each: those that are not over go on by themselves."""
        track = sequence.track
        position = len(track.output)
        unfinished: list[Track] = []
        for choice, drawn in zip(track.choices, sampled, strict=True):
            fork = track.fork(choice)
            ending = fork.append(drawn.token)
            self._tell(track, choice, position, drawn, ending)
            if ending is None:
                unfinished.append(fork)
        self._live.fork(sequence, unfinished)

    def _advance_held(self, sequence: Running, sampled: Sequence[Sampled]) -> None:
        """A held prompt has a chunk more; with the last one come its first tokens, and it is sealed."""
        if not sampled:
            self._announce(sequence)
            return
        track = sequence.track
        position = len(track.output)
        endings = [track.rules.ending(position, drawn.token) for drawn in sampled]
        for choice, drawn, ending in zip(track.choices, sampled, endings, strict=True):
            self._tell(track, choice, position, drawn, ending)
        if any(ending is None for ending in endings):
            self._seal(sequence)
            self._live.hold(sequence)
        elif sequence.num_announced > 0:
            # Somebody may be reading what was announced, so only release() gives it back.
            self._live.hold(sequence)
        else:
            self._live.finish(sequence)

    def _announce(self, sequence: Running) -> None:
        first, stop = sequence.num_announced, sequence.num_computed // self._block_size
        if stop > first:
            sequence.num_announced = stop
            self.filled.append(Filled(sequence.track.id, tuple(sequence.blocks[first:stop]), first))

    def _seal(self, sequence: Running) -> None:
        first = sequence.num_announced
        num_last = sequence.num_computed - (len(sequence.blocks) - 1) * self._block_size
        if num_last < self._block_size:
            self._kv.zero_tail(sequence.blocks[-1], num_last)
        self.filled.append(Filled(sequence.track.id, tuple(sequence.blocks[first:]), first, True, num_last))

    def _tell(self, track: Track, choice: int, position: int, drawn: Sampled, ending: Ending | None) -> None:
        self.tokens.append(
            TokenOut(
                request=track.id,
                choice=choice,
                position=position,
                token=drawn.token,
                logprobs=drawn.logprobs,
                finish=None if ending is None else ending.reason,
                stop_token=None if ending is None else ending.stop_token,
            )
        )
