"""Incremental text equals whole text, whatever the cuts; stop strings are found wherever they fall."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.detokenizer import REPLACEMENT, IncrementalDetokenizer, StopMatcher
from tests.support.http import byte_fallback_json, byte_level_json

BYTE_LEVEL = Tokenizer.from_buffer(byte_level_json())
BYTE_FALLBACK = Tokenizer.from_buffer(byte_fallback_json())
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def detokenizer(tokenizer: Tokenizer, context: list[int] | None = None) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(functools.partial(decode, tokenizer), context or [])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@given(text=TEXT)
@settings(deadline=None)
def test_parts_join_to_the_whole_and_split_no_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = detokenizer(tokenizer)
    parts = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(parts) == decode(tokenizer, ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


@given(prompt=TEXT, text=TEXT)
@settings(deadline=None)
def test_text_continues_the_prompts(prompt: str, text: str) -> None:
    ids = BYTE_LEVEL.encode(prompt + text, add_special_tokens=False).ids
    cut = len(BYTE_LEVEL.encode(prompt, add_special_tokens=False).ids)
    stream = detokenizer(BYTE_LEVEL, ids[:cut])
    new = "".join(stream.push(token) for token in ids[cut:]) + stream.flush()
    assert decode(BYTE_LEVEL, ids).endswith(new)
    if REPLACEMENT not in decode(BYTE_LEVEL, ids[:cut]):
        assert decode(BYTE_LEVEL, ids[:cut]) + new == decode(BYTE_LEVEL, ids)


def test_leading_space_survives_after_a_prompt() -> None:
    prompt = BYTE_FALLBACK.encode("Hello", add_special_tokens=False).ids
    world = BYTE_FALLBACK.token_to_id("▁world")
    assert detokenizer(BYTE_FALLBACK, prompt).push(world) == " world"
    assert detokenizer(BYTE_FALLBACK).push(world) == "world"


def test_output_completes_a_character_that_the_prompt_began() -> None:
    ids = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    stream = detokenizer(BYTE_FALLBACK, [*BYTE_FALLBACK.encode("Hello").ids, ids[0]])
    assert stream.push(ids[1]) == "é"


def test_an_incomplete_character_is_flushed_as_a_replacement() -> None:
    stream = detokenizer(BYTE_FALLBACK)
    assert stream.push(BYTE_FALLBACK.token_to_id("<0xF0>")) == ""
    assert stream.flush() == REPLACEMENT
    assert stream.flush() == ""


def test_endless_invalid_bytes_do_not_pile_up() -> None:
    calls: list[int] = []

    def counting(ids: list[int]) -> str:
        calls.append(len(ids))
        return decode(BYTE_FALLBACK, ids)

    stream = IncrementalDetokenizer(counting)
    parts = [stream.push(BYTE_FALLBACK.token_to_id("<0x80>")) for _ in range(500)] + [stream.flush()]
    assert "".join(parts) == REPLACEMENT * 500
    assert max(calls) < 100


def test_hidden_tokens_leave_no_trace() -> None:
    hidden = frozenset({BYTE_LEVEL.token_to_id("<|end|>")})
    stream = IncrementalDetokenizer(functools.partial(decode, BYTE_LEVEL), (), hidden)
    ids = BYTE_LEVEL.encode("Hi 😀", add_special_tokens=False).ids
    woven = [token for pair in zip(ids, [*hidden] * len(ids), strict=True) for token in pair]
    assert "".join(stream.push(token) for token in woven) == "Hi 😀"


# Stop strings.


def first_end(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """By brute force: (end, start, stop) of the match that ends first, the longest of those."""
    found = [
        (start + len(stop), start, stop) for stop in stops for start in range(len(text)) if text.startswith(stop, start)
    ]
    return min(found, default=None)


PIECES = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_match_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher, out, matched = StopMatcher(stops, include=include), "", None
    for piece in pieces:
        released, matched = matcher.push(piece)
        out += released
        if matched is not None:
            break
    else:
        out += matcher.flush()
    whole = "".join(pieces)
    expected = first_end(whole, stops)
    if expected is None:
        assert (out, matched) == (whole, None)
    else:
        end, start, stop = expected
        assert (out, matched) == (whole[: end if include else start], stop)


@given(pieces=PIECES, stops=STOPS)
def test_nothing_released_could_have_begun_a_match(pieces: list[str], stops: list[str]) -> None:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        released, matched = matcher.push(piece)
        out += released
        assert first_end(out, stops) is None
        if matched is not None:
            return


def test_text_that_cannot_match_is_not_held() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("no ST") == ("no ", None)
    assert matcher.push("AR") == ("STAR", None)


def test_match_before_it_is_armed_does_not_count() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("xab", armed=False) == ("xab", None)
    assert matcher.push("a", armed=False) == ("", None)
    assert matcher.push("b") == ("", "ab")
