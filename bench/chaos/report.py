"""What a run showed, in numbers and as text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.chaos.answers import Answer, Verdict
from bench.chaos.faults import FaultKind
from bench.chaos.settings import ChaosSettings
from bench.chaos.storm import Done
from bench.figures import percentile


@dataclass(frozen=True, slots=True)
class Finding:
    """A wrong or a lost answer, with the faults it lived through."""

    answer: Answer
    verdict: Verdict
    why: str
    faults: tuple[str, ...]

    def describe(self, seed: int) -> str:
        ask = self.answer.ask
        how = f"{ask.question.kind}, {'streamed' if ask.stream else 'whole'}, {len(ask.question.prompt)} tokens"
        took = self.answer.ended_s - self.answer.sent_s
        return (
            f"{self.verdict.value.upper()}: seed {seed}, question {ask.question.number} ({how}, salt {ask.salt!r}) "
            f"after {took:.1f} s: {self.why}; faults: {', '.join(self.faults) or 'none'}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    settings: ChaosSettings
    calm: tuple[Answer, ...]
    answers: tuple[Answer, ...]
    faults: tuple[Done, ...]
    num_flipped: int
    """Bits that were really flipped."""
    findings: tuple[Finding, ...]
    left: Mapping[str, int]
    """What the stack still held at the end, by place."""
    settled_s: float

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict is verdict for finding in self.findings)

    @property
    def is_clean(self) -> bool:
        return not self.findings and not self.left

    def text(self) -> str:
        lines = [
            f"seed              {self.settings.seed}",
            f"requests          {len(self.answers):,} ({self._mix()})",
            f"faults            {len(self.faults):,}",
            *self._by_kind(),
            f"bits flipped      {self.num_flipped:,}",
            f"wrong answers     {self.count(Verdict.WRONG)}",
            f"lost answers      {self.count(Verdict.LOST)}",
            f"left behind       {self._left()}",
            "",
            f"{'milliseconds':<17} {'without faults':>22} {'with faults':>22}",
            f"{'':<17} {'p50':>11}{'p99':>11} {'p50':>11}{'p99':>11}",
            *(
                f"{name:<17} {_pair(samples(self.calm))} {_pair(samples(self.answers))}"
                for name, samples in (("TTFT", _ttft), ("ITL", _itl), ("whole answer", _whole))
            ),
        ]
        return "\n".join(lines)

    def _by_kind(self) -> list[str]:
        """A line for each verb: where, how often."""
        kinds = Counter(done.fault.kind for done in self.faults)
        return [
            f"  {verb:<15} "
            + ", ".join(f"{kind.place} {kinds[kind]}" for kind in FaultKind if kind.verb == verb and kinds[kind])
            for verb in dict.fromkeys(kind.verb for kind in FaultKind)
            if any(kind.verb == verb for kind in kinds)
        ]

    def _mix(self) -> str:
        counts = Counter(answer.ask.question.kind for answer in self.answers)
        counts["streamed"] = sum(answer.ask.stream for answer in self.answers)
        return ", ".join(f"{count:,} {what}" for what, count in counts.items())

    def _left(self) -> str:
        if not self.left:
            return f"nothing, {self.settled_s:.1f} s after the last answer"
        return ", ".join(f"{where}: {count}" for where, count in self.left.items())


def _ttft(answers: Iterable[Answer]) -> list[float]:
    return [answer.ttft_s for answer in answers if answer.ttft_s is not None and answer.error is None]


def _itl(answers: Iterable[Answer]) -> list[float]:
    return [gap for answer in answers if answer.error is None for gap in answer.itl_s]


def _whole(answers: Iterable[Answer]) -> list[float]:
    return [answer.ended_s - answer.sent_s for answer in answers if answer.error is None]


def _pair(seconds: list[float]) -> str:
    if not seconds:
        return f"{'-':>11}{'-':>11}"
    ordered = sorted(1000.0 * value for value in seconds)
    return f"{percentile(ordered, 50.0):>11,.1f}{percentile(ordered, 99.0):>11,.1f}"
