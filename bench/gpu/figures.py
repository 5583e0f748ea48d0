"""What was measured, what it is held against, and whether that holds; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from router.values import JsonObject


@dataclass(frozen=True, slots=True)
class Goal:
    """What a ratio should be: ``limit`` at least, or at most. Goals ``of_time`` are for GPUs alone."""

    limit: float
    is_least: bool = True
    of_time: bool = True

    def holds(self, ratio: float) -> bool:
        return ratio >= self.limit if self.is_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """``value`` in ``unit``. ``ratio``, if any, is ``of`` something measured in the same run."""

    case: str
    value: float
    unit: str
    ratio: float | None = None
    of: str = ""
    goal: Goal | None = None

    @property
    def holds(self) -> bool | None:
        """None where there is no goal."""
        return None if self.goal is None or self.ratio is None else self.goal.holds(self.ratio)


@dataclass(frozen=True, slots=True)
class Missing:
    """What could not be measured; ``is_fault`` where it should have been."""

    case: str
    why: str
    is_fault: bool = False


Entry = Figure | Missing


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    entries: tuple[Entry, ...]
    duration_s: float


def table(sections: Sequence[Section]) -> str:
    """Markdown."""
    lines = ["| what | measured | ratio | of | goal | holds |", "|---|---|---|---|---|---|"]
    for section in sections:
        lines.append(f"| **{section.name}** | | | | | |")
        lines += [_row(entry) for entry in section.entries]
    return "\n".join(lines)


def _row(entry: Entry) -> str:
    if isinstance(entry, Missing):
        why = " ".join(entry.why.split()).replace("|", "/")
        return f"| {entry.case} | {'failed' if entry.is_fault else 'left out'}: {why} | | | | |"
    ratio = "" if entry.ratio is None else f"{entry.ratio:.3f}"
    goal = "" if entry.goal is None else str(entry.goal)
    holds = {None: "", True: "yes", False: "**no**"}[entry.holds]
    return f"| {entry.case} | {_number(entry.value)} {entry.unit} | {ratio} | {entry.of} | {goal} | {holds} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def to_json(about: JsonObject, sections: Sequence[Section]) -> JsonObject:
    return {**about, "sections": [_section_json(section) for section in sections]}


def _section_json(section: Section) -> JsonObject:
    entries: list[JsonObject] = []
    for entry in section.entries:
        shown: JsonObject = asdict(entry)
        if isinstance(entry, Figure):
            shown |= {"goal": None if entry.goal is None else str(entry.goal), "holds": entry.holds}
        entries.append(shown)
    return {"name": section.name, "duration_s": round(section.duration_s, 3), "entries": list(entries)}
