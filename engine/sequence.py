"""A sequence's stages of life on one engine, one type each.

    Waiting ──admitted──▶ Running ──finished──▶ gone
       ▲                   │  │
       └────preempted──────┘  ├──prompt computed, n > 1──▶ n times Running (fork)
                              └──prompt computed, held───▶ Held ──released──▶ gone
    Reserved ──adopted──▶ n times Running

Blocks are owned by Running, Held and Reserved only. What survives all of them is the Track: the tokens.

    tokens of a Track:   [0 ............ len(prompt) ............. len(track))
                          request.prompt              output
    of a Running one:    [0 ...... num_computed) [num_computed ... len(track))
                          in KV                   to be computed; the last row samples the next token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.batch import SampleSpec
from engine.rules import Ending, FinishRules
from proto.control import SOON_TOKENS
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId, RequestId
from proto.request import Request, derive_seed

Rank = tuple[int, int, int, int]
"""Order of sequences: (priority, 0 if it goes before new work, arrival, first choice). Lower is served first."""


@dataclass(slots=True, eq=False)
class Track:
    """The tokens of one sequence. It feeds several ``choices`` until the prompt is computed, and one afterwards.

    ``hashes`` names the leading full blocks, as far as they were asked for. ``output`` holds the tokens generated so
    far, forced ones included; it is empty while several choices share the track.
    """

    request: Request
    rules: FinishRules
    priority: int
    arrival: int
    choices: tuple[int, ...]
    output: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    is_held: bool = False

    def __len__(self) -> int:
        return len(self.request.prompt) + len(self.output)

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def rank(self) -> Rank:
        return (self.priority, 0, self.arrival, self.choices[0])

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        split = self.num_prompt
        if start >= split:
            return tuple(self.output[start - split : stop - split])
        return self.request.prompt[start:stop] + tuple(self.output[: max(0, stop - split)])

    def append(self, token: int) -> Ending | None:
        """Takes the next token of the track's one choice, and says whether it is the last."""
        self.output.append(token)
        return self.rules.ending(len(self.output) - 1, token)

    @property
    def is_finished(self) -> bool:
        """Whether the last token known is the choice's last."""
        return bool(self.output) and self.rules.ending(len(self.output) - 1, self.output[-1]) is not None

    def fork(self, choice: int) -> Track:
        """The track of one of this track's choices from here on."""
        return replace(self, choices=(choice,), output=list(self.output), hashes=list(self.hashes), is_held=False)

    def resumed(self) -> list[Track]:
        """One track per choice, each with its forced tokens."""
        forced = zip(self.choices, self.request.forced, strict=True)
        return [replace(self, choices=(choice,), output=list(tokens), hashes=[]) for choice, tokens in forced]

    def gives_up(self, choice: int) -> bool:
        """Feeds ``choice`` no more; true if that was the last. A held prompt keeps its choices."""
        if self.is_held or choice not in self.choices:
            return False
        if self.choices == (choice,):
            return True
        self.choices = tuple(other for other in self.choices if other != choice)
        return False

    def sample_specs(self, num_unknown: int = 0) -> tuple[SampleSpec, ...]:
        """What to draw after the last token and ``num_unknown`` more, which are being computed, per choice."""
        position = len(self.output) + num_unknown
        request = self.request
        return tuple(
            SampleSpec(
                choice=choice,
                seed=derive_seed(request.seed, choice),
                position=position,
                params=request.params,
                prompt=request.prompt,
                output=self.output,
                suppressed=self.rules.suppressed(position),
            )
            for choice in self.choices
        )

    def extend_hashes(self, hasher: BlockHasher, num_blocks: int) -> None:
        """Names the first ``num_blocks`` blocks, all full."""
        have = len(self.hashes)
        if num_blocks > have:
            parent = self.hashes[-1] if have else hasher.root(self.request.cache_salt)
            tokens = self.tokens(have * hasher.block_size, num_blocks * hasher.block_size)
            self.hashes += hasher.extend(parent, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """Has no blocks. ``is_urgent``: it was preempted, or resumes what a client has already seen part of."""

    track: Track
    is_urgent: bool = False

    @property
    def rank(self) -> Rank:
        priority, _, arrival, choice = self.track.rank
        return (priority, 0 if self.is_urgent else 1, arrival, choice)


@dataclass(slots=True, eq=False)
class Running:
    """Has blocks for all its tokens when admitted, and grows block by block as it generates.

    A partial last block may be shared between forked choices; whoever writes to it first takes a copy. Blocks beyond
    the tokens' end are the sequence's own. ``num_cached`` counts the leading blocks already offered to the prefix
    cache, ``num_announced`` those already announced in a ``Filled``; ``num_in_flight`` the tokens that submitted steps
    compute.

    running ahead:  [0 ...... num_computed) [num_computed .. num_scheduled) [num_scheduled]
                     in KV                   in flight                       is unknown until those have landed
    """

    track: Track
    blocks: list[BlockId]
    num_computed: int
    num_cached: int = 0
    num_announced: int = 0
    num_in_flight: int = 0

    @property
    def num_scheduled(self) -> int:
        return self.num_computed + self.num_in_flight

    @property
    def ends_by_length(self) -> bool:
        """Whether the token that is being computed is the choice's last, whichever it is."""
        return self.num_in_flight > 0 and len(self.track.output) + 1 >= self.track.rules.max_output

    @property
    def ends_soon(self) -> bool:
        """Whether it generates, and ends within SOON_TOKENS more tokens at the latest, whatever they are."""
        track = self.track
        num_left = track.rules.max_output - len(track.output)
        return num_left <= SOON_TOKENS and not self.is_prefilling and not track.is_held

    @property
    def num_remaining(self) -> int:
        return len(self.track) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Computes a prompt, or again what it had before it was preempted; otherwise it generates."""
        return self.num_remaining > 1 or self.num_computed < self.track.num_prompt

    @property
    def rank(self) -> Rank:
        return self.track.rank


@dataclass(frozen=True, slots=True)
class Held:
    """A computed prompt whose blocks wait for the end of their hand-off."""

    request: RequestId
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a prompt that is computed elsewhere: one block per block of the prompt, the first ``num_present`` of
    which hold their content already and must not be written."""

    request: RequestId
    blocks: tuple[BlockId, ...]
    num_present: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """A Reservation as its engine keeps it. ``growth`` has one block per choice, for the first tokens it generates."""

    reservation: Reservation
    growth: tuple[BlockId, ...]
    hashes: tuple[BlockHash, ...]
    num_tokens: int
    unwanted: set[int] = field(default_factory=set)
    """Choices that were finished from outside before they could run."""


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def all_blocks(running: Sequence[Running], held: Sequence[Held], reserved: Sequence[Reserved]) -> list[BlockId]:
    """Every reference to a block that sequences have, with repetition."""
    blocks = [block for sequence in running for block in sequence.blocks]
    blocks += [block for sequence in held for block in sequence.blocks]
    for room in reserved:
        blocks += room.reservation.blocks + room.growth
    return blocks
