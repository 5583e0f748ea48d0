"""Two results side by side, with the ratio of each figure. Knows the JSON that ``bench.report`` writes (and vLLM's)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from bench.settings import METRICS
from proto.errors import SettingsError
from router.values import Json, JsonObject

_RATES = {
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "output_throughput": "Output throughput (tok/s)",
    "total_token_throughput": "Total throughput (tok/s)",
}
_LATENCY = re.compile(rf"(mean|median|p[\d.]+)_({'|'.join(METRICS)})_ms")
_SETUP = ("model_id", "backend", "num_prompts", "request_rate", "burstiness", "max_concurrency")
_LOADS = ("completed", "failed", "total_input_tokens", "total_output_tokens", "cached_input_tokens")


def read_result(path: Path) -> JsonObject:
    """A saved result. Raises SettingsError where it is none."""
    try:
        found: Json = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(found, dict) or "request_throughput" not in found:
        raise SettingsError(f"{path} is not a result of a serving benchmark.")
    return found


def compare(a: JsonObject, b: JsonObject, rounds: Sequence[tuple[JsonObject, JsonObject]] = ()) -> str:
    """A table of ``a``, ``b`` and b/a. Several ``rounds`` add the least and the greatest ratio among them.

    Rates are better the higher, latencies the lower; the last column names the better one, unless the rounds disagree.
    """
    lines = [f"{'':<30}{'A':>12}{'B':>12}{'B / A':>9}{'  rounds' if rounds else '':<15}  better"]
    for key, label in _shared(a, b):
        first, second = _number(a, key), _number(b, key)
        ratios = [ratio for x, y in rounds if (ratio := _ratio(_number(x, key), _number(y, key))) is not None]
        ratio = _ratio(first, second)
        span = f"  {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        verdict = _better(ratios or ([] if ratio is None else [ratio]), higher=key in _RATES)
        lines.append(f"{label:<30}{_show(first):>12}{_show(second):>12}{_show(ratio):>9}{span:<15}  {verdict}".rstrip())
    return "\n".join([*lines, *_warnings(a, b)])


def _shared(a: JsonObject, b: JsonObject) -> list[tuple[str, str]]:
    """Keys and labels of what both measured, in A's order."""
    labels = {key: label for key, label in _RATES.items() if key in a}
    for key in a:
        if found := _LATENCY.fullmatch(key):
            labels[key] = f"{found[1].capitalize()} {found[2].upper()} (ms)"
    return [
        (key, label) for key, label in labels.items() if _number(a, key) is not None and _number(b, key) is not None
    ]


def _better(ratios: Sequence[float], *, higher: bool) -> str:
    if ratios and min(ratios) > 1:
        return "B" if higher else "A"
    if ratios and max(ratios) < 1:
        return "A" if higher else "B"
    return ""


def _warnings(a: JsonObject, b: JsonObject) -> list[str]:
    """What makes the two unlike: settings that differ, failures, and answers of another length."""
    different = [key for key in _SETUP if a.get(key) != b.get(key)]
    found = [f"note: {key} differs: {a.get(key)} and {b.get(key)}" for key in different]
    counts = [key for key in _LOADS if (a.get(key) or 0) != (b.get(key) or 0)]
    return found + [f"note: {key}: {a.get(key)} and {b.get(key)}" for key in counts]


def _number(result: JsonObject, key: str) -> float | None:
    value = result.get(key)
    return float(value) if isinstance(value, int | float) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
