"""Incremental text equals whole text, whatever the cuts; stop strings are found wherever they fall."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.detokenizer import REPLACEMENT, IncrementalDetokenizer, StopMatcher
from tests.support.http import byte_fallback_json, byte_level_json, served_model

BYTE_LEVEL = Tokenizer.from_buffer(byte_level_json())
BYTE_FALLBACK = Tokenizer.from_buffer(byte_fallback_json())
BYTES_OF = {
    BYTE_LEVEL: served_model().token_bytes,
    BYTE_FALLBACK: served_model({"tokenizer.json": byte_fallback_json()}).token_bytes,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def detokenizer(tokenizer: Tokenizer, context: list[int] | None = None) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(functools.partial(decode, tokenizer), BYTES_OF[tokenizer], context or [])


def byte_tokens(text: str) -> list[int]:
    """``text`` as the byte-fallback tokenizer writes characters it does not know."""
    return [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


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


@pytest.mark.parametrize("char", ["é", "語", "😀"])
@pytest.mark.parametrize("before", ["", "Hello", "Hello日本", "日本" * 20])
def test_what_the_prompt_said_before_a_character_it_began_is_not_said_again(before: str, char: str) -> None:
    hello = BYTE_FALLBACK.encode("Hello", add_special_tokens=False).ids if before.startswith("Hello") else []
    prompt = [*hello, *byte_tokens(before.removeprefix("Hello"))]
    ids = byte_tokens(char)
    for cut in range(1, len(ids)):
        stream = detokenizer(BYTE_FALLBACK, prompt + ids[:cut])
        assert "".join(stream.push(token) for token in ids[cut:] + byte_tokens("日本")) == f"{char}日本"
        assert detokenizer(BYTE_FALLBACK, prompt + ids[:cut]).flush() == ""


@given(before=TEXT, char=st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), after=TEXT, data=st.data())
@settings(deadline=None)
def test_a_byte_level_prompt_may_end_anywhere(before: str, char: str, after: str, data: st.DataObject) -> None:
    """Inside a character, behind one or several tokens, or behind a real replacement character."""
    ids = BYTE_LEVEL.encode(before + char + after, add_special_tokens=False).ids
    cut = data.draw(st.integers(0, len(ids)))
    stream = detokenizer(BYTE_LEVEL, ids[:cut])
    shown = b"".join(map(BYTES_OF[BYTE_LEVEL], ids[:cut])).decode(errors="ignore")
    new = "".join(stream.push(token) for token in ids[cut:]) + stream.flush()
    assert new == ("" if cut == len(ids) else (before + char + after)[len(shown) :])


def test_a_real_replacement_character_at_the_prompts_end_is_the_prompts() -> None:
    assert detokenizer(BYTE_FALLBACK, byte_tokens(f"日{REPLACEMENT}")).push(byte_tokens("a")[0]) == "a"
    prompt = BYTE_LEVEL.encode(f"x {REPLACEMENT}", add_special_tokens=False).ids
    stream = detokenizer(BYTE_LEVEL, prompt)
    ids = BYTE_LEVEL.encode(" hello", add_special_tokens=False).ids
    assert "".join(stream.push(token) for token in ids) == " hello"


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

    stream = IncrementalDetokenizer(counting, BYTES_OF[BYTE_FALLBACK])
    parts = [stream.push(BYTE_FALLBACK.token_to_id("<0x80>")) for _ in range(500)] + [stream.flush()]
    assert "".join(parts) == REPLACEMENT * 500
    assert max(calls) < 100


def test_hidden_tokens_leave_no_trace() -> None:
    hidden = frozenset({BYTE_LEVEL.token_to_id("<|end|>")})
    stream = IncrementalDetokenizer(functools.partial(decode, BYTE_LEVEL), BYTES_OF[BYTE_LEVEL], (), hidden)
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
