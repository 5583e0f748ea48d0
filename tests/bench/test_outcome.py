"""What a stream's lines amount to: pieces, times, tokens, and every way to fail."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from bench.outcome import Answer, Failure, Outcome, Transcript
from tests.bench.scripted import answer, completion, delta, usage

START = 100.0


def judge(*events: Mapping[str, object] | str, prompt_len: int | None = None, wanted: int | None = None) -> Outcome:
    """The outcome of events at 101, 102, ... s of a request sent at 100 s."""
    transcript = Transcript(START)
    for second, event in enumerate(events, 1):
        text = event if isinstance(event, str) else json.dumps(event)
        transcript.line(f"data: {text}", START + second)
        transcript.line("", START + second)
    return transcript.outcome(START + 50, prompt_len=prompt_len, wanted_tokens=wanted)


def answered(*events: Mapping[str, object] | str, prompt_len: int | None = None) -> Answer:
    outcome = judge(*events, prompt_len=prompt_len)
    assert isinstance(outcome, Answer)
    return outcome


def test_a_completions_times_follow_their_definitions() -> None:
    found = answered(completion("a"), completion("b"), completion("c", "length"), usage(9, 3, cached=4), "[DONE]")
    assert found.ttft_s == 1.0
    assert found.e2el_s == 3.0  # the usage event comes later, and is no part of the answer
    assert found.tpot_s == 1.0
    assert found.itl_s == (1.0, 1.0)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (9, 3, 4)
    assert found.is_counted_by_server


def test_tpot_divides_by_tokens_and_itl_by_pieces() -> None:
    found = answered(completion("a"), completion("bcdef", "length"), usage(1, 6))
    assert found.itl_s == (1.0,)
    assert found.tpot_s == pytest.approx(0.2)


def test_one_token_has_no_tpot_and_no_gap() -> None:
    found = answer(0.5)
    assert found.tpot_s is None
    assert found.itl_s == ()


def test_a_chats_role_is_no_piece_and_its_end_counts_for_the_latency() -> None:
    found = answered(delta(role="assistant", content=""), delta(content="a"), delta(finish="stop"), usage(3, 2))
    assert found.piece_s == (2.0,)
    assert found.e2el_s == 3.0
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("name", ["content", "reasoning", "reasoning_content"])
def test_reasoning_is_shown_too(name: str) -> None:
    assert answered(delta(**{name: "hm"}), delta(finish="stop"), usage(3, 1)).ttft_s == 1.0


def test_an_event_without_text_is_no_piece_whoever_sends_it() -> None:
    silent = answered(completion("a"), completion("b", "length"), usage(1, 3))
    talkative = answered(completion(""), completion("a"), completion(""), completion("b", "length"), usage(1, 3))
    assert len(silent.piece_s) == len(talkative.piece_s) == 2
    assert talkative.piece_s == (2.0, 4.0)


def test_token_ids_make_a_token_without_text_a_piece() -> None:
    event = {"choices": [{"index": 0, "text": "", "token_ids": [7, 8], "finish_reason": None}]}
    found = answered(event, completion("a", "length"))
    assert found.piece_s == (1.0, 2.0)
    assert found.output_tokens == 2


def test_an_answer_that_shows_nothing_was_first_seen_at_its_end() -> None:
    found = answered(completion(""), completion("", "length"), usage(1, 4))
    assert found.piece_s == (2.0,)
    assert found.ttft_s == found.e2el_s == 2.0


def test_without_usage_pieces_are_counted_and_that_is_known() -> None:
    found = answered(completion("a"), completion("b", "stop"), "[DONE]", prompt_len=12)
    assert (found.prompt_tokens, found.output_tokens) == (12, 2)
    assert not found.is_counted_by_server
    assert found.cached_tokens is None


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([completion("a")], "the stream ended without a finish reason"),
        ([], "the stream ended without a finish reason"),
        ([completion("", "stop"), usage(5, 0)], "the answer has no token"),
        ([completion("a"), {"error": {"message": "worker lost", "code": 503}}], "worker lost"),
        ([completion("a", "stop"), {"error": "flat"}], "flat"),
        ([{"error": {"code": 1}}], "the stream reports an error"),
    ],
)
def test_failures_say_why(events: list[Mapping[str, object]], message: str) -> None:
    outcome = judge(*events)
    assert outcome == Failure(START, 50.0, message)


def test_only_data_lines_count() -> None:
    transcript = Transcript(START)
    for line in (": keep-alive", "event: message", "id: 3", ""):
        transcript.line(line, START)
    with pytest.raises(ValueError):
        transcript.line("data: {half", START)
    with pytest.raises(ValueError, match="not an object"):
        transcript.line("data: [1]", START)
