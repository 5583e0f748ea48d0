"""Token ids to text as they come, and stop strings found in that text. Knows how to decode; no tokenizer, no HTTP.

A token's text depends on what stands before it (a leading space, a character whose bytes span tokens), so each new
token is decoded together with a short window of earlier ones, and the window's own text is cut off:

    ids:    ... already given out ...[ shown ][ pending ]
    text:                             shown    new text, given out once it ends on a whole character
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not one yet."""

_CONTEXT_TOKENS = 6
_CHARACTER_BYTES = 4
_PENDING_LIMIT = 32
"""A character needs at most four bytes, so this many tokens without a whole one really are no text."""


class IncrementalDetokenizer:
    """The text of one growing token sequence. The parts that ``push`` and ``flush`` return, joined, are what decoding
    the whole sequence at once gives; no part ends inside a character.

    ``context`` is what stands before the sequence (the prompt); its text is not given out, except for a character that
    it has only begun: the output's first bytes complete that, so it is the output's. ``bytes_of`` gives a token's UTF-8
    bytes, which tell such a beginning from a real U+FFFD. ``hidden`` ids have no text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        bytes_of: Callable[[int], bytes],
        context: Sequence[int] = (),
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        visible = self._end_of(context)
        begun = _begun(b"".join(map(bytes_of, visible[1 - _CHARACTER_BYTES :])))
        tail: list[int] = []
        num_bytes = 0
        while num_bytes < begun:
            tail.insert(0, visible.pop())
            num_bytes += len(bytes_of(tail[0]))
        window = self._window(visible)
        self._ids = window + tail
        self._num_read = len(window)
        self._has_new = False
        self._shown = len(decode(window)) if window else 0
        if num_bytes > begun:
            # It shares its token with text, as bytes of a byte-level tokenizer may: there it shows as one character.
            self._shown = len(decode(self._ids)) - 1

    def push(self, token: int) -> str:
        """Appends ``token``. The text that became certain, often none or a word."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        self._has_new = True
        text = self._decode(self._ids)
        unfinished = text.endswith(REPLACEMENT) and len(self._ids) - self._num_read < _PENDING_LIMIT
        if unfinished or len(text) <= self._shown:
            return ""
        new = text[self._shown :]
        self._slide(text)
        return new

    def flush(self) -> str:
        """At the sequence's end: what was held back, with replacement characters for bytes that stayed incomplete."""
        if not self._has_new:
            return ""
        text = self._decode(self._ids)
        new = text[self._shown :]
        self._slide(text)
        return new

    def _slide(self, text: str) -> None:
        """Everything is given out: the tokens that were pending become the window, if they show any text alone."""
        tail = self._ids[self._num_read :]
        tail_text = self._decode(tail)
        if tail_text:
            self._ids, self._shown = tail, len(tail_text)
        else:
            self._shown = len(text)
        self._num_read = len(self._ids)
        self._has_new = False

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """The last tokens of ``context`` that have text: a window's, those before it that its first character may need,
        and those of a character that is not whole."""
        visible: list[int] = []
        for token in reversed(context):
            if token not in self._hidden:
                visible.append(token)
            if len(visible) == _CONTEXT_TOKENS + 2 * _CHARACTER_BYTES:
                break
        visible.reverse()
        return visible

    def _window(self, visible: list[int]) -> list[int]:
        """The end of ``visible``, starting between two characters."""
        for start in range(max(len(visible) - _CONTEXT_TOKENS, 0), -1, -1):
            if not self._decode(visible[start:]).startswith(REPLACEMENT):
                return visible[start:]
        return visible


def _begun(data: bytes) -> int:
    """How many bytes at the end of ``data`` are the beginning of a character that is not whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    held_back, _ = decoder.getstate()
    return len(held_back)


class StopMatcher:
    """Finds stop strings in a text that comes in pieces; the result does not depend on where the pieces are cut.

    The match that ends first wins; of several that end there, the longest. Text that may be the start of a match is
    held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "checked parameters have no empty stop string"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Appends ``text``: what may be given out, and the stop string that ended it. No push may follow a match.

        With ``armed`` false (before ``min_tokens``) a match that ends in this piece does not count.
        """
        whole = self._held + text
        match = self._first_match(whole, len(self._held)) if armed else None
        if match is not None:
            start, end, stop = match
            self._held = ""
            return whole[: end if self._include else start], stop
        keep = max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], None

    def flush(self) -> str:
        """At the text's end: what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, whole: str, num_old: int) -> tuple[int, int, str] | None:
        """(start, end, stop) of the first match that ends after ``num_old`` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = whole.find(stop, max(num_old - len(stop) + 1, 0))
            end = start + len(stop)
            if start >= 0 and (best is None or (end, start) < (best[1], best[0])):
                best = (start, end, stop)
        return best


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a start of ``stop``, but not all of it."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
