"""Flags, into settings; and what is refused, with the reason."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from bench.options import read_compare, read_serve
from bench.settings import Backend, CustomData, PrefixData, RandomData, Saving, ServeSettings
from proto.errors import SettingsError

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def read(line: str, **environ: str) -> ServeSettings:
    return read_serve(shlex.split(line), environ)


def test_the_defaults() -> None:
    settings = read("")
    assert settings.target.base_url == "http://127.0.0.1:8000"
    assert settings.target.endpoint == "/v1/completions"
    assert settings.dataset == RandomData(1024, 128, 0.0, 0)
    assert math.isinf(settings.load.request_rate)
    assert settings.load.num_prompts == 1000
    assert settings.wanted.metrics == ("ttft", "tpot", "itl")
    assert (settings.saving, settings.versus, settings.num_rounds) == (None, None, 1)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_may_end_in_v1(url: str) -> None:
    assert read(f"--base-url {url}").target.base_url == "http://h:1"


def test_chat_has_its_endpoint() -> None:
    target = read("--backend openai-chat --host h --port 5").target
    assert (target.backend, target.endpoint) == (Backend.CHAT, "/v1/chat/completions")
    assert target.base_url == "http://h:5"
    assert read("--endpoint /x").target.endpoint == "/x"


def test_vllms_name_for_completions() -> None:
    target = read("--backend vllm --model Qwen/Qwen3-0.6B --served-model-name q").target
    assert (target.backend, target.endpoint, target.model) == (Backend.COMPLETIONS, "/v1/completions", "q")


def test_headers_are_not_shown() -> None:
    settings = read("--header X-Key=hush X-Other=1")
    assert settings.target.headers == (("X-Key", "hush"), ("X-Other", "1"))
    assert "hush" not in repr(settings)


def test_underscores_are_hyphens() -> None:
    assert read("--num_prompts=7 --request_rate 2.5").load.num_prompts == 7


def test_the_key_comes_from_the_environment_and_is_not_shown() -> None:
    settings = read("", OPENAI_API_KEY="second", TANDEM_API_KEY="first")
    assert settings.target.api_key == "first"
    assert "first" not in repr(settings)


def test_datasets() -> None:
    assert read("--input-len 5 --random-output-len 6 --random-range-ratio 0.5").dataset == RandomData(5, 6, 0.5, 0)
    line = "--dataset-name prefix_repetition --prefix-repetition-num-prefixes 3"
    assert read(line).dataset == PrefixData(256, 256, 3, 128)
    assert read("--dataset-name custom --dataset-path p.jsonl").dataset == CustomData(Path("p.jsonl"), 256)


def test_what_is_reported() -> None:
    wanted = read("--percentile-metrics ttft,e2el --metric-percentiles 50,99.9 --goodput ttft:200 e2el:5e3").wanted
    assert wanted.metrics == ("ttft", "e2el")
    assert wanted.percentiles == (50.0, 99.9)
    assert wanted.goodput == {"ttft": 200.0, "e2el": 5000.0}


def test_saving() -> None:
    assert read("--save-result").saving == Saving()
    assert read("--save-detailed --result-dir d --result-filename f").saving == Saving(Path("d"), "f", True)


def test_versus_means_rounds() -> None:
    settings = read("--versus http://other:9 --model m")
    assert settings.num_rounds == 4
    assert settings.versus is not None
    assert (settings.versus.base_url, settings.versus.model) == ("http://other:9", "m")
    assert read("--versus http://other:9 --rounds 2").num_rounds == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num-prompts 0", "whole number of at least 1, not '0'"),
        ("--num-prompts x", "whole number of at least 1, not 'x'"),
        ("--request-rate 0", "requests per second"),
        ("--request-rate nan", "requests per second"),
        ("--burstiness inf", "number of at least"),
        ("--random-range-ratio 1", "from 0 to below 1"),
        ("--metric-percentiles 101", "from 0 to 100"),
        ("--percentile-metrics ttft,foo", "some of ttft,tpot,itl,e2el"),
        ("--goodput itl:5", r"ttft\|tpot\|e2el:MILLISECONDS"),
        ("--goodput ttft", "MILLISECONDS"),
        ("--extra-body [1]", "JSON object"),
        ("--header X-Key", "NAME=VALUE"),
        ("--ready-check-timeout-sec -1", "number of at least 0"),
        ("--extra-body {", "not JSON"),
        ("--base-url h:1", "starts with http"),
        ("--dataset-name custom", "needs --dataset-path"),
        ("--dataset-path f", "of --dataset-name custom"),
        ("--result-filename f", "needs --save-result"),
        ("--num-prompt 5", "num-prompt"),
    ],
)
def test_what_makes_no_sense_is_refused(line: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(line)


def test_compare_takes_two_files() -> None:
    assert read_compare(["a", "b"]) == (Path("a"), Path("b"))
    with pytest.raises(SettingsError):
        read_compare(["a"])


def test_the_pages_commands_are_accepted() -> None:
    page = DOCS.read_text().replace("\\\n", " ")
    lines = [line.split("#")[0] for line in page.splitlines() if "tandem bench " in line and line.startswith(".venv")]
    commands = [shlex.split(re.sub(r"\$\w+", "x", line))[2:] for line in lines]
    assert {command[0] for command in commands} >= {"serve", "compare"}
    for name, *flags in commands:
        if name == "serve":
            read_serve(flags, {})
        elif name == "compare":
            read_compare(flags)
