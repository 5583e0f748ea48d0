"""One request's tokens, from several workers that may repeat themselves, put in order exactly once.

    choice 0   accepted: 0 1 2 3         the next one wanted is 4
               held back:       · 5 6    until 4 arrives; a copy of 0..3 is dropped and counted

The first token of a choice comes from the prefill worker and the others from the decode worker, over two streams, so
position 1 may well arrive before position 0. Knows positions; knows no workers and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from proto.errors import RemoteProtocolError
from proto.request import FinishReason, TokenOut

MAX_HELD_BACK = 1024


class _Choice:
    __slots__ = ("finish", "held_back", "stopped", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.held_back: dict[int, TokenOut] = {}
        self.finish: FinishReason | None = None
        self.stopped = False

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.stopped


class TokenAssembly:
    """``accept`` returns what has become deliverable; nothing is ever returned twice."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self.num_duplicates = 0
        self.num_conflicts = 0
        """Duplicates that named another token: two workers disagreed."""

    def accept(self, out: TokenOut) -> list[TokenOut]:
        """Takes one token and returns those now in order. Raises RemoteProtocolError for an impossible one."""
        if not 0 <= out.choice < len(self._choices) or out.position < 0:
            raise RemoteProtocolError(f"token for choice {out.choice}, position {out.position} of {out.request}")
        choice = self._choices[out.choice]
        if out.position < len(choice.tokens):
            self.num_duplicates += 1
            self.num_conflicts += choice.tokens[out.position] != out.token
            return []
        if choice.is_done:
            return []
        if out.position in choice.held_back:
            self.num_duplicates += 1
            return []
        if len(choice.held_back) >= MAX_HELD_BACK:
            raise RemoteProtocolError(f"position {len(choice.tokens)} of choice {out.choice} never came: {out.request}")
        choice.held_back[out.position] = out
        return list(self._in_order(choice))

    def accept_all(self, outs: Iterable[TokenOut]) -> tuple[list[TokenOut], RemoteProtocolError | None]:
        """Takes tokens up to the first impossible one, and returns those now in order, and what is wrong with that."""
        ready: list[TokenOut] = []
        try:
            for out in outs:
                ready += self.accept(out)
        except RemoteProtocolError as error:
            return ready, error
        return ready, None

    def stop(self, choice: int) -> bool:
        """No more of ``choice`` is wanted; whether it was still running."""
        state = self._choices[choice]
        was_running = not state.is_done
        state.stopped = True
        state.held_back.clear()
        return was_running

    def forget_held_back(self) -> None:
        """What waits for a gap to fill came from a try that is over."""
        for choice in self._choices:
            choice.held_back.clear()

    @property
    def is_complete(self) -> bool:
        return all(choice.is_done for choice in self._choices)

    @property
    def is_started(self) -> bool:
        """Whether any token is accepted: from here on a retry carries tokens."""
        return any(choice.tokens for choice in self._choices)

    def lacks(self, positions: tuple[int, ...]) -> bool:
        """Whether a running choice still waits for its token at the position given for it, or for an earlier one."""
        both = zip(self._choices, positions, strict=True)
        return any(len(choice.tokens) <= position and not choice.is_done for choice, position in both)

    def finishes(self) -> tuple[FinishReason, ...]:
        """Why each choice that is over ended; a stop string is a stop."""
        reasons = (choice.finish or (FinishReason.STOP if choice.stopped else None) for choice in self._choices)
        return tuple(reason for reason in reasons if reason is not None)

    def done_choices(self) -> tuple[int, ...]:
        return tuple(at for at, choice in enumerate(self._choices) if choice.is_done)

    def stopped_choices(self) -> tuple[int, ...]:
        return tuple(at for at, choice in enumerate(self._choices) if choice.stopped and choice.finish is None)

    def accepted(self) -> tuple[tuple[int, ...], ...]:
        """Per choice, every token accepted so far: what a resume forces."""
        return tuple(tuple(choice.tokens) for choice in self._choices)

    def positions(self) -> tuple[int, ...]:
        """Per choice, the next position wanted."""
        return tuple(len(choice.tokens) for choice in self._choices)

    def _in_order(self, choice: _Choice) -> Iterator[TokenOut]:
        while (out := choice.held_back.pop(len(choice.tokens), None)) is not None:
            choice.tokens.append(out.token)
            yield out
            if out.finish is not None:
                choice.finish = out.finish
                choice.held_back.clear()
