"""Room on a decode worker: how much of what a request wants is free, will soon be, and when there will be enough.

    its blocks   [ free ][ soon free ][ in use for longer .......................................... ]
    wanted       [ by the request ][ by what goes before it ][ kept for the growth of what runs ]

A decode worker grants room only beyond one more block for each sequence that runs there, so those are wanted, too. When
there will be enough is told by what ends for certain within SOON_TOKENS, or by the length of usual answers: within that
many tokens, on the average, all that is there now has ended. Alone on a worker a request lacks nothing.

Knows numbers of blocks and tokens; knows no workers, and no time but tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from proto.control import SOON_TOKENS, Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one request wants of one worker that is under ``load``. ``own``: blocks of what is not cached there, and the
    first of each choice; ``ahead``: blocks that others will have before it; ``usual_tokens``: the length of an answer,
    0 where it is not known."""

    load: Load
    own: int
    ahead: int
    usual_tokens: float

    @property
    def share_lacking(self) -> float:
        """Share of the request's blocks that are not free, from 0 to 1."""
        return self._share(self.load.num_free_blocks)

    @property
    def share_out_of_sight(self) -> float:
        """Share of them that will not be free soon, either."""
        return self._share(self.load.num_free_blocks + self.load.num_soon_free_blocks)

    @property
    def tokens_until(self) -> float:
        """How many tokens each sequence there will say before there is room; infinite where nobody can tell."""
        load = self.load
        num_taken = load.num_blocks - load.num_free_blocks + self.ahead
        # What never fits waits until nothing else is there, and is then refused by name.
        num_lacking = min(self._num_wanted - load.num_free_blocks, num_taken + load.num_running)
        if not load.num_blocks or num_lacking <= 0:
            return 0.0
        freed = load.num_soon_free_blocks / SOON_TOKENS
        if self.usual_tokens:  # With a sequence its blocks go, and what was kept for its growth.
            freed = max(freed, (min(num_taken, load.num_blocks) + load.num_running) / self.usual_tokens)
        return num_lacking / freed if freed else math.inf

    @property
    def _num_wanted(self) -> int:
        return self.own + self.ahead + self.load.num_running

    def _share(self, num_free: int) -> float:
        if not self.load.num_blocks:
            return 0.0
        return min(1.0, max(0, self._num_wanted - num_free) / self.own)
