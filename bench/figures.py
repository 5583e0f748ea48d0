"""What the outcomes of a run amount to. Pure; the latencies are defined in ``bench.outcome``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.load import Run
from bench.outcome import Answer, Failure
from bench.settings import METRICS, Wanted


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds. ``std`` is the population's; ``percentiles`` holds (percent, value)."""

    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers. Tokens are of completed requests only; rates are per second of the whole run."""

    duration_s: float
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    """None where the server does not tell."""
    goodput: float | None
    """Requests per second that kept every limit; None where no limit was given."""
    peak_output_rate: float
    """Most tokens within one second, seconds counted from the start; a piece has an equal share of its answer's."""
    peak_concurrency: int
    spreads: Mapping[str, Spread | None]
    """By metric; None where nothing was measured."""
    num_short: int
    """Answers with fewer tokens than asked for."""
    num_uncounted: int
    """Answers whose tokens the server did not count."""
    errors: tuple[tuple[str, int], ...]
    """Messages and how often each came, the most frequent first."""

    def per_second(self, count: float) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def request_rate(self) -> float:
        return self.per_second(self.completed)

    @property
    def output_rate(self) -> float:
        return self.per_second(self.output_tokens)

    @property
    def token_rate(self) -> float:
        return self.per_second(self.input_tokens + self.output_tokens)


def figures_of(run: Run, wanted: Wanted) -> Figures:
    answers = [outcome for outcome in run.outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in run.outcomes if isinstance(outcome, Failure)]
    cached = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    samples = _samples(answers)
    good = sum(is_good(answer, wanted.goodput) for answer in answers)
    return Figures(
        duration_s=run.duration_s,
        completed=len(answers),
        failed=len(failures),
        input_tokens=sum(answer.prompt_tokens for answer in answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
        cached_tokens=sum(cached) if cached else None,
        goodput=good / run.duration_s if wanted.goodput and run.duration_s > 0 else None,
        peak_output_rate=_peak_output(answers),
        peak_concurrency=_peak_concurrency([*answers, *failures]),
        spreads={metric: spread(samples[metric], wanted.percentiles) for metric in METRICS if metric in wanted.metrics},
        num_short=sum(answer.output_tokens < (answer.wanted_tokens or 0) for answer in answers),
        num_uncounted=sum(not answer.is_counted_by_server for answer in answers),
        errors=tuple(Counter(failure.message for failure in failures).most_common()),
    )


def _samples(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Milliseconds by metric: one per answer, but ITL one per gap, and TPOT none for an answer of one token."""
    seconds: dict[str, Iterable[float]] = {
        "ttft": (answer.ttft_s for answer in answers),
        "tpot": (answer.tpot_s for answer in answers if answer.tpot_s is not None),
        "itl": (gap for answer in answers for gap in answer.itl_s),
        "e2el": (answer.e2el_s for answer in answers),
    }
    return {metric: [1000.0 * value for value in values] for metric, values in seconds.items()}


def is_good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether the answer keeps every limit (ms). An answer of one token keeps any TPOT."""
    measured = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.e2el_s}
    return all(1000.0 * measured[metric] <= limit for metric, limit in limits.items())


def spread(samples: Sequence[float], percentiles: Sequence[float]) -> Spread | None:
    """None for no samples: no number is honest there."""
    if not samples:
        return None
    ordered = sorted(samples)
    return Spread(
        mean=statistics.fmean(ordered),
        median=percentile(ordered, 50.0),
        std=statistics.pstdev(ordered),
        percentiles=tuple((percent, percentile(ordered, percent)) for percent in percentiles),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, by linear interpolation between the two nearest, as NumPy's default does."""
    position = (len(ordered) - 1) * percent / 100.0
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _peak_output(answers: Iterable[Answer]) -> float:
    tokens: Counter[int] = Counter()
    per_second: dict[int, float] = {}
    for answer in answers:
        share = answer.output_tokens / len(answer.piece_s)
        tokens.clear()
        tokens.update(math.floor(answer.sent_s + at) for at in answer.piece_s)
        for second, pieces in tokens.items():
            per_second[second] = per_second.get(second, 0.0) + pieces * share
    return max(per_second.values(), default=0.0)


def _peak_concurrency(outcomes: Iterable[Answer | Failure]) -> int:
    """The most requests that were open at one moment. One that ends as another is sent does not overlap it."""
    changes: list[tuple[float, int]] = []
    for outcome in outcomes:
        changes += [(outcome.sent_s, 1), (outcome.sent_s + outcome.e2el_s, -1)]
    peak = num_open = 0
    for _, change in sorted(changes):
        num_open += change
        peak = max(peak, num_open)
    return peak
