"""The table and the JSON, whole, for a run written here; and two results compared."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from bench.compare import compare, read_result
from bench.figures import figures_of
from bench.load import Run
from bench.outcome import Failure
from bench.report import About, default_filename, table, to_json
from bench.settings import Load, Sampling, Saving, ServeSettings, Target, Wanted
from proto.errors import SettingsError
from router.values import JsonObject
from tests.bench.scripted import answer

SETTINGS = ServeSettings(
    Target("http://h:1"),
    load=Load(num_prompts=3, request_rate=2.0, max_concurrency=4, seed=5),
    sampling=Sampling(ignore_eos=True),
    wanted=Wanted(("ttft", "tpot"), (50.0, 99.5), {"ttft": 1500.0}),
)
ABOUT = About(SETTINGS, "org/tiny", "ids", datetime(2026, 1, 2, 3, 4, 5))
RUN = Run((answer(1.0, 2.0, 3.0, wanted=4), Failure(0.5, 0.1, "503: full"), answer(2.0, 2.5, sent=1.0)), 4.0)

TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2
Failed requests:                         1
Maximum request concurrency:             4
Request rate configured (RPS):           2.00
Benchmark duration (s):                  4.00
Total input tokens:                      20
Total generated tokens:                  5
Request throughput (req/s):              0.50
Request goodput (req/s):                 0.25
Output token throughput (tok/s):         1.25
Peak output token throughput (tok/s):    3.00
Peak concurrent requests:                2
Total token throughput (tok/s):          6.25
Answers shorter than asked for:          1
---------------Time to First Token----------------
Mean TTFT (ms):                          1500.00
Median TTFT (ms):                        1500.00
P50 TTFT (ms):                           1500.00
P99.5 TTFT (ms):                         1995.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          750.00
Median TPOT (ms):                        750.00
P50 TPOT (ms):                           750.00
P99.5 TPOT (ms):                         997.50
----------------------Errors----------------------
    1 x 503: full
=================================================="""


def test_the_table() -> None:
    assert table(ABOUT, figures_of(RUN, SETTINGS.wanted)) == TABLE


def test_what_was_not_measured_is_a_dash_and_null() -> None:
    run = Run((Failure(0.0, 1.0, "boom"),), 1.0)
    figures = figures_of(run, SETTINGS.wanted)
    assert "Mean TTFT (ms):                          -\n" in table(ABOUT, figures)
    result = to_json(ABOUT, figures, run)
    assert result["mean_ttft_ms"] is None
    assert result["p99.5_tpot_ms"] is None
    assert result["error_counts"] == {"boom": 1}


def test_many_errors_are_cut_short() -> None:
    run = Run(tuple(Failure(0.0, 1.0, f"error {number}") for number in range(7)), 1.0)
    text = table(ABOUT, figures_of(run, SETTINGS.wanted))
    assert "error 4" in text
    assert "error 5" not in text
    assert "and 2 more" in text


def test_the_json_has_vllms_names() -> None:
    result = to_json(ABOUT, figures_of(RUN, SETTINGS.wanted), RUN)
    expected = {
        "date": "20260102-030405",
        "backend": "openai",
        "model_id": "org/tiny",
        "num_prompts": 3,
        "request_rate": 2.0,
        "max_concurrency": 4,
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 5,
        "request_throughput": 0.5,
        "request_goodput": 0.25,
        "output_throughput": 1.25,
        "total_token_throughput": 6.25,
        "max_output_tokens_per_s": 3.0,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 1500.0,
        "median_tpot_ms": 750.0,
        "std_ttft_ms": 500.0,
        "p50_ttft_ms": 1500.0,
        "p99.5_ttft_ms": pytest.approx(1995.0),
    }
    assert {key: result.get(key) for key in expected} == expected
    assert json.loads(json.dumps(result)) == result
    assert {"ttfts", "errors"} & result.keys() == set()


def test_no_rate_is_inf_in_valid_json() -> None:
    about = replace(ABOUT, settings=replace(SETTINGS, load=Load()))
    result = to_json(about, figures_of(RUN, SETTINGS.wanted), RUN)
    assert result["request_rate"] == "inf"
    assert "Infinity" not in json.dumps(result)


def test_details_have_an_entry_per_request() -> None:
    about = replace(ABOUT, settings=replace(SETTINGS, saving=Saving(detailed=True)))
    result = to_json(about, figures_of(RUN, SETTINGS.wanted), RUN)
    assert result["ttfts"] == [1.0, 0.0, 2.0]
    assert result["itls"] == [[1.0, 1.0], [], [0.5]]
    assert result["errors"] == ["", "503: full", ""]
    assert result["output_lens"] == [3, 0, 2]
    assert result["start_times"] == [0.0, 0.5, 1.0]


def test_the_files_name_says_what_was_measured() -> None:
    assert default_filename(ABOUT) == "openai-2qps-concurrency4-tiny-20260102-030405.json"
    about = replace(ABOUT, settings=replace(SETTINGS, load=Load()))
    assert default_filename(about) == "openai-infqps-tiny-20260102-030405.json"


def result_of(throughput: float, ttft: float, **more: float | str | None) -> JsonObject:
    return {"request_throughput": throughput, "mean_ttft_ms": ttft, "std_ttft_ms": 1.0, **more}


def rows(text: str) -> dict[str, list[str]]:
    """The words behind each label."""
    lines = [line for line in text.splitlines()[1:] if not line.startswith("note:")]
    return {line[:30].strip(): line[30:].split() for line in lines}


def test_ratios_and_who_is_better() -> None:
    found = rows(compare(result_of(10.0, 200.0), result_of(20.0, 300.0)))
    assert found == {
        "Request throughput (req/s)": ["10.00", "20.00", "2.00", "B"],
        "Mean TTFT (ms)": ["200.00", "300.00", "1.50", "A"],
    }


def test_rounds_show_their_range_and_nobody_wins_where_they_disagree() -> None:
    a, b = result_of(10.0, 200.0), result_of(12.0, 100.0)
    rounds = [(result_of(10.0, 200.0), result_of(9.0, 90.0)), (result_of(10.0, 200.0), result_of(15.0, 110.0))]
    found = rows(compare(a, b, rounds))
    assert found["Request throughput (req/s)"] == ["10.00", "12.00", "1.20", "0.90", "to", "1.50"]
    assert found["Mean TTFT (ms)"] == ["200.00", "100.00", "0.50", "0.45", "to", "0.55", "B"]


def test_only_what_both_measured_is_compared() -> None:
    a = result_of(10.0, 200.0, p99_itl_ms=5.0, mean_tpot_ms=1.0, request_goodput=None)
    b = result_of(10.0, 200.0, mean_tpot_ms=None, request_goodput=None)
    assert set(rows(compare(a, b))) == {"Request throughput (req/s)", "Mean TTFT (ms)"}


def test_a_zero_has_no_ratio() -> None:
    assert rows(compare(result_of(0.0, 0.0), result_of(1.0, 2.0)))["Mean TTFT (ms)"] == ["0.00", "2.00", "-"]


def test_what_makes_two_results_unlike_is_noted() -> None:
    text = compare(result_of(1.0, 1.0, request_rate=1.0, failed=0), result_of(1.0, 1.0, request_rate="inf", failed=3))
    assert "note: request_rate differs: 1.0 and inf" in text
    assert "note: failed: 0 and 3" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"a\.json"):
        read_result(path)
