"""Figures as a table to read and as JSON to keep, in the layout and under the names of vLLM's serving benchmark.

Beyond those names the JSON has ``cached_input_tokens``, ``short_answers``, ``uncounted_answers``, ``error_counts``,
``seed``, ``rounds`` and ``tokens_from``. A latency that was not measured is null, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from bench.figures import Figures, Spread
from bench.load import Run
from bench.outcome import Answer
from bench.settings import ServeSettings
from router.values import Json, JsonObject

_WIDTH = 50
_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_MOST_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class About:
    """What was measured: the server's model, and where random prompts came from."""

    settings: ServeSettings
    model: str
    tokens_from: str
    when: datetime


def table(about: About, figures: Figures) -> str:
    lines = [
        _title("Serving Benchmark Result", "="),
        *(f"{label + ':':<40} {value:<10}" for label, value in _rows(about, figures)),
    ]
    for metric, measured in figures.spreads.items():
        short, title = _TITLES[metric]
        lines.append(_title(title, "-"))
        lines += [f"{f'{name} {short} (ms):':<40} {value:<10}" for name, value in _spread_rows(about, measured)]
    if figures.errors:
        lines.append(_title("Errors", "-"))
        lines += [f"{count:>5} x {message}" for message, count in figures.errors[:_MOST_ERRORS_SHOWN]]
        if (hidden := len(figures.errors) - _MOST_ERRORS_SHOWN) > 0:
            lines.append(f"        and {hidden} more")
    lines.append("=" * _WIDTH)
    return "\n".join(line.rstrip() for line in lines)


def _title(text: str, fill: str) -> str:
    return f" {text} ".center(_WIDTH, fill) if fill == "=" else text.center(_WIDTH, fill)


def _rows(about: About, figures: Figures) -> Iterator[tuple[str, str]]:
    load = about.settings.load
    yield "Successful requests", str(figures.completed)
    yield "Failed requests", str(figures.failed)
    if load.max_concurrency is not None:
        yield "Maximum request concurrency", str(load.max_concurrency)
    if math.isfinite(load.request_rate):
        yield "Request rate configured (RPS)", _number(load.request_rate)
    yield "Benchmark duration (s)", _number(figures.duration_s)
    yield "Total input tokens", str(figures.input_tokens)
    if figures.cached_tokens is not None:
        yield "Of which were cached", str(figures.cached_tokens)
    yield "Total generated tokens", str(figures.output_tokens)
    yield "Request throughput (req/s)", _number(figures.request_rate)
    if figures.goodput is not None:
        yield "Request goodput (req/s)", _number(figures.goodput)
    yield "Output token throughput (tok/s)", _number(figures.output_rate)
    yield "Peak output token throughput (tok/s)", _number(figures.peak_output_rate)
    yield "Peak concurrent requests", str(figures.peak_concurrency)
    yield "Total token throughput (tok/s)", _number(figures.token_rate)
    if figures.num_short and about.settings.sampling.ignore_eos:
        yield "Answers shorter than asked for", str(figures.num_short)
    if figures.num_uncounted:
        yield "Answers without usage (tokens guessed)", str(figures.num_uncounted)


def _spread_rows(about: About, measured: Spread | None) -> Iterator[tuple[str, str]]:
    percents = about.settings.wanted.percentiles
    if measured is None:
        yield from ((name, "-") for name in ("Mean", "Median", *(f"P{percent:g}" for percent in percents)))
        return
    yield "Mean", _number(measured.mean)
    yield "Median", _number(measured.median)
    for percent, value in measured.percentiles:
        yield f"P{percent:g}", _number(value)


def _number(value: float) -> str:
    return f"{value:.2f}"


def to_json(about: About, figures: Figures, run: Run) -> JsonObject:
    """The result as it is saved. ``run`` is used for the details only, where they are wanted."""
    settings = about.settings
    load = settings.load
    result: JsonObject = {
        "date": about.when.strftime("%Y%m%d-%H%M%S"),
        "backend": settings.target.backend.value,
        "endpoint_type": settings.target.backend.value,
        "base_url": settings.target.base_url,
        "model_id": about.model,
        "tokenizer_id": settings.tokens.tokenizer,
        "tokens_from": about.tokens_from,
        "num_prompts": load.num_prompts,
        "rounds": settings.num_rounds,
        "seed": load.seed,
        "request_rate": load.request_rate if math.isfinite(load.request_rate) else "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "duration": figures.duration_s,
        "completed": figures.completed,
        "failed": figures.failed,
        "total_input_tokens": figures.input_tokens,
        "total_output_tokens": figures.output_tokens,
        "cached_input_tokens": figures.cached_tokens,
        "request_throughput": figures.request_rate,
        "request_goodput": figures.goodput,
        "output_throughput": figures.output_rate,
        "total_token_throughput": figures.token_rate,
        "max_output_tokens_per_s": figures.peak_output_rate,
        "max_concurrent_requests": figures.peak_concurrency,
        "short_answers": figures.num_short,
        "uncounted_answers": figures.num_uncounted,
        "error_counts": dict(figures.errors),
    }
    for metric, measured in figures.spreads.items():
        result |= _spread_json(metric, measured, settings.wanted.percentiles)
    return result | _details(run) if settings.saving is not None and settings.saving.detailed else result


def _spread_json(metric: str, measured: Spread | None, percents: tuple[float, ...]) -> JsonObject:
    values: dict[str, float | None] = {"mean": None, "median": None, "std": None}
    values |= {f"p{percent:g}": None for percent in percents}
    if measured is not None:
        values |= {"mean": measured.mean, "median": measured.median, "std": measured.std}
        values |= {f"p{percent:g}": value for percent, value in measured.percentiles}
    return {f"{name}_{metric}_ms": value for name, value in values.items()}


def _details(run: Run) -> JsonObject:
    """One entry per request, in their order; a failed one has an error and zeros. Times are in seconds."""
    answers = [outcome if isinstance(outcome, Answer) else None for outcome in run.outcomes]
    start_times: list[Json] = [outcome.sent_s for outcome in run.outcomes]
    return {
        "start_times": start_times,
        "input_lens": [0 if answer is None else answer.prompt_tokens for answer in answers],
        "output_lens": [0 if answer is None else answer.output_tokens for answer in answers],
        "ttfts": [0.0 if answer is None else answer.ttft_s for answer in answers],
        "itls": [[] if answer is None else list(answer.itl_s) for answer in answers],
        "e2els": [0.0 if answer is None else answer.e2el_s for answer in answers],
        "errors": ["" if isinstance(outcome, Answer) else outcome.message for outcome in run.outcomes],
    }


def default_filename(about: About) -> str:
    load = about.settings.load
    concurrency = "" if load.max_concurrency is None else f"-concurrency{load.max_concurrency}"
    model = about.model.rstrip("/").rsplit("/", 1)[-1]
    stamp = about.when.strftime("%Y%m%d-%H%M%S")
    return f"{about.settings.target.backend.value}-{load.request_rate:g}qps{concurrency}-{model}-{stamp}.json"
