"""Prompts and arrivals: made by the seed alone, of the lengths asked for."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from bench.settings import Backend, Load, PrefixData, RandomData, TokenChoice
from bench.vocabulary import PROBE, Vocabulary, from_tokenizer, ids_below, ids_of_probe, without_asking, words
from bench.workload import Request, arrival_times, make_requests, read_jsonl
from proto.errors import SettingsError
from tests.support.http import byte_level_json

IDS = ids_below(500)


def test_the_same_seed_makes_the_same_requests_and_another_one_others() -> None:
    data = RandomData(20, 5, 0.5, 3)
    assert make_requests(data, IDS, 30, "1") == make_requests(data, IDS, 30, "1")
    assert make_requests(data, IDS, 30, "1") != make_requests(data, IDS, 30, "2")


@pytest.mark.parametrize("data", [RandomData(20, 5, 0.5, 3), PrefixData(4, 4, 3, 2)])
def test_more_requests_begin_with_the_same(data: RandomData | PrefixData) -> None:
    assert make_requests(data, IDS, 50, "1")[:20] == make_requests(data, IDS, 20, "1")


def test_lengths_are_exact() -> None:
    for request in make_requests(RandomData(30, 7), IDS, 10, "0"):
        assert (len(request.prompt), request.prompt_len, request.output_len) == (30, 30, 7)
        assert all(isinstance(token, int) and 0 <= token < 500 for token in request.prompt)


def test_lengths_vary_within_the_ratio_and_reach_its_ends() -> None:
    made = make_requests(RandomData(10, 10, 0.2), IDS, 300, "0")
    assert {request.prompt_len for request in made} == set(range(8, 13))
    assert {request.output_len for request in made} == set(range(8, 13))


def test_no_length_is_zero() -> None:
    made = make_requests(RandomData(1, 1, 0.9), IDS, 50, "0")
    assert {request.output_len for request in made} == {1, 2}


def test_a_random_prefix_is_shared_and_comes_on_top() -> None:
    made = make_requests(RandomData(10, 5, prefix_len=6), IDS, 20, "0")
    assert len({request.prompt[:6] for request in made}) == 1
    assert len({request.prompt[6:] for request in made}) == 20
    assert {request.prompt_len for request in made} == {16}


def test_every_prefix_comes_once_per_turn() -> None:
    made = make_requests(PrefixData(8, 4, 3, 2), IDS, 30, "0")
    prefixes = [request.prompt[:8] for request in made]
    turns = [prefixes[i : i + 3] for i in range(0, 30, 3)]
    assert all(set(turn) == set(prefixes) and len(set(turn)) == 3 for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert len({request.prompt for request in made}) == 30


def test_without_a_rate_all_are_due_at_once() -> None:
    assert arrival_times(Load(num_prompts=4), "0") == [0.0] * 4


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 50.0])
def test_the_mean_gap_is_the_rates(burstiness: float) -> None:
    times = arrival_times(Load(num_prompts=101, request_rate=4.0, burstiness=burstiness), "0")
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100 / 4.0)
    assert times == arrival_times(Load(num_prompts=101, request_rate=4.0, burstiness=burstiness), "0")


def test_less_burstiness_is_a_more_even_beat() -> None:
    def unevenness(burstiness: float) -> float:
        times = arrival_times(Load(num_prompts=500, request_rate=1.0, burstiness=burstiness), "0")
        return math.fsum((later - earlier - 1.0) ** 2 for earlier, later in pairwise(times))

    assert unevenness(0.2) > unevenness(1.0) > unevenness(50.0)


@pytest.mark.parametrize("count", [1, 2])
def test_few_arrivals(count: int) -> None:
    assert arrival_times(Load(num_prompts=count, request_rate=2.0), "0") == pytest.approx([0.0, 0.5][:count])


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_custom_dataset_keeps_its_order(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "hello", "output_tokens": 3}, "", {"prompt": [4, 5]})
    assert read_jsonl(path, 9) == [Request("hello", 3), Request((4, 5), 9, 2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":1: not JSON"),
        ([1], ":1: expects an object"),
        ({"prompt": ""}, ":1: prompt must be"),
        ({"prompt": [1, "a"]}, ":1: prompt must be"),
        ({"text": "a"}, ":1: prompt must be"),
        ({"prompt": "a", "output_tokens": 0}, ":1: output_tokens must be"),
        ("", "there is no prompt"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_jsonl(write(tmp_path, row), 9)


def test_a_missing_dataset_is_an_error_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        read_jsonl(tmp_path / "nowhere", 9)


def rendered(vocabulary: Vocabulary, count: int) -> object:
    return vocabulary.render(vocabulary.draw(random.Random(0), count))


def test_ids_come_from_the_probe_or_from_a_range_that_all_have() -> None:
    assert ids_of_probe([9, 7, 9]).tokens == [7, 9]
    assert ids_of_probe(None).tokens == ids_of_probe([]).tokens == range(100, 1000)
    assert len(set(PROBE.split())) > 600


def test_chat_prompts_are_words() -> None:
    text = rendered(words(), 12)
    assert isinstance(text, str)
    assert len(text.split()) == 12


def test_what_needs_no_server() -> None:
    assert without_asking(TokenChoice(), Backend.COMPLETIONS) is None
    sized = without_asking(TokenChoice(vocab_size=50), Backend.COMPLETIONS)
    assert sized is not None
    assert sized.tokens == range(50)
    chat = without_asking(TokenChoice(vocab_size=50), Backend.CHAT)
    assert chat is not None
    assert isinstance(rendered(chat, 2), str)


def test_a_tokenizers_tokens_are_whole_and_ordinary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    vocabulary = from_tokenizer(str(tmp_path))
    tokenizer = Tokenizer.from_str(byte_level_json().decode())
    assert 100 < len(vocabulary.tokens) < tokenizer.get_vocab_size()
    for token in vocabulary.tokens:
        assert tokenizer.encode(vocabulary.render([token]), add_special_tokens=False).ids == [token]
    assert from_tokenizer(str(tmp_path / "tokenizer.json")).tokens == vocabulary.tokens


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no tokenizer\.json"):
        from_tokenizer(str(tmp_path))
