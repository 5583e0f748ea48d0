"""When a choice ends, and what an engine refuses at the door."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.facts import EngineFacts
from engine.rules import Ending, FinishRules, check_request, check_room
from proto.errors import InvalidRequest
from proto.request import FinishReason, Request, SamplingParams
from tests.support.paged_engine import EOS, STOP, VOCAB, make_facts, make_request

FACTS = make_facts(num_blocks=8, block_size=4, max_model_len=30, max_num_seqs=4)


def rules(facts: EngineFacts = FACTS, **options: object) -> FinishRules:
    return FinishRules.of(make_request("a", [3] * 10, **options), facts)  # type: ignore[arg-type]


def test_eos_and_stop_tokens_end_a_choice_and_only_the_latter_is_named() -> None:
    both = rules(stop_token_ids=(STOP,))
    assert both.ending(0, EOS) == Ending(FinishReason.STOP)
    assert both.ending(0, STOP) == Ending(FinishReason.STOP, STOP)
    assert both.ending(0, 5) is None
    assert rules(stop_token_ids=(EOS,)).ending(0, EOS) == Ending(FinishReason.STOP)
    assert rules(ignore_eos=True).ending(0, EOS) is None
    assert rules(ignore_eos=True, stop_token_ids=(EOS,)).ending(0, EOS) == Ending(FinishReason.STOP, EOS)


def test_nothing_stops_a_choice_before_its_minimum() -> None:
    late = rules(stop_token_ids=(STOP,), min_tokens=2, max_tokens=3)
    assert late.suppressed(1) == {EOS, STOP}
    assert late.suppressed(2) == frozenset()
    assert late.ending(1, STOP) is None
    assert late.ending(1, EOS) is None
    assert late.ending(2, STOP) == Ending(FinishReason.STOP, STOP)


def test_a_stop_at_the_last_position_is_a_stop() -> None:
    assert rules(max_tokens=3).ending(2, EOS) == Ending(FinishReason.STOP)
    assert rules(max_tokens=3).ending(2, 5) == Ending(FinishReason.LENGTH)
    assert rules(max_tokens=3).ending(1, 5) is None


def test_the_context_ends_what_nothing_else_does() -> None:
    assert rules(max_tokens=None).max_output == 20
    assert rules(max_tokens=100).max_output == 20
    assert rules(replace(FACTS, num_blocks=4), max_tokens=None).max_output == 7, "16 tokens in KV, and one more drawn"


@pytest.mark.parametrize(
    ("request_", "hold", "message"),
    [
        (make_request("a", [3] * 30), False, "context of 30"),
        (make_request("a", [3] * 10, forced=((4,) * 21,)), False, "context of 30"),
        (make_request("a", [3], n=5), False, "at most 4"),
        (make_request("a", [3] * 10, max_tokens=18), False, "need 7 KV blocks of 4 tokens; this worker has 6"),
        (make_request("a", [3] * 25), True, "need 7 KV blocks"),
        (make_request("a", [VOCAB]), False, "prompt holds token ids from 16 to 16"),
        (make_request("a", [3, -1]), False, "vocabulary has 16"),
        (make_request("a", [3], forced=((VOCAB,),)), False, "forced"),
        (make_request("a", [3], stop_token_ids=(VOCAB,)), False, "stop_token_ids"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: Request, hold: bool, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_request(request_, replace(FACTS, num_blocks=6), hold=hold)


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary_never_reach_the_sampler(name: str) -> None:
    value: object = {VOCAB: 1.0} if name == "logit_bias" else (VOCAB,)
    params = SamplingParams(seed=1, **{name: value}).checked()  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        check_request(replace(make_request("a", [3]), params=params), FACTS)
    assert caught.value.param == name


def test_what_just_fits_is_taken() -> None:
    tight = replace(FACTS, num_blocks=6)
    check_request(make_request("a", [3] * 10, max_tokens=15), tight)
    check_request(make_request("a", [3] * 24, max_tokens=9), tight, hold=True)
    check_request(make_request("a", [3] * 24, max_tokens=None), tight)
    check_request(make_request("a", [3] * 29, max_tokens=99), FACTS)


def test_room_for_prompts_computed_elsewhere() -> None:
    check_room(20, 3, FACTS)
    for num_tokens, num_choices, message in (
        (30, 1, "context of 30"),
        (5, 5, "at most 4"),
        (21, 3, "need 9 KV blocks"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            check_room(num_tokens, num_choices, FACTS)
