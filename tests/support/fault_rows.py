"""The rows of the fault matrix, and the table of what became of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proto.lifecycle import Stage
from tests.support.fault_stages import GRPC, SHM, STAGES
from tests.support.faults import FAULTS

TRANSPORTS = (GRPC, SHM)
TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
_BETWEEN_P_AND_D = (Stage.PREFILLING, Stage.STREAMING, Stage.SEALED)
"""The stages in which blocks are, or should be, on their way."""
_NOT_ANY_MORE = {"P-D cut", "P-D silent", "P-D slow", "payload bits flipped"}
"""Between P and D nothing is on its way while D decodes."""
_ON_SHARED_MEMORY = {
    "P killed",
    "D killed",
    "P and D killed",
    "P stopped, wakes up later",
    "D stopped, wakes up later",
    "P-D cut",
    "P-D silent",
    "router killed",
}
"""What can be otherwise where D copies the blocks out of P's memory."""
_D_LOST_TO_P = {"D killed", "D stopped, wakes up later", "P-D cut", "P-D silent"}


@dataclass(frozen=True, slots=True)
class Row:
    transport: str
    stage: Stage
    fault: str

    def __str__(self) -> str:
        return f"{self.transport}, {self.stage.value}, {self.fault}"

    @property
    def is_computed_once(self) -> bool:
        """Whether P, which is left alone, must serve another D from the blocks it has."""
        return self.stage in _BETWEEN_P_AND_D and self.fault in _D_LOST_TO_P


@dataclass(slots=True)
class Outcome:
    row: Row
    holds: bool = False
    what: str = ""
    pause_s: float | None = None
    """The client's longest wait for a token, from the fault on."""
    whole_s: float | None = None
    """Until every worker is back, the ledger is closed and every block is given back."""


_SAMPLE = {
    Row(GRPC, Stage.STREAMING, "payload bits flipped"),
    Row(GRPC, Stage.STREAMING, "Redis out of memory"),
    Row(GRPC, Stage.SEALED, "D killed"),
    Row(GRPC, Stage.DECODING, "D killed"),
    Row(SHM, Stage.STREAMING, "P killed"),
}


def rows(*, only_sample: bool) -> list[Row]:
    every = [
        Row(transport, stage, fault)
        for transport in TRANSPORTS
        for stage in STAGES
        for fault in FAULTS
        if _applies(transport, stage, fault)
    ]
    return [row for row in every if row in _SAMPLE] if only_sample else every


def _applies(transport: str, stage: Stage, fault: str) -> bool:
    if transport == SHM:
        return stage in _BETWEEN_P_AND_D and fault in _ON_SHARED_MEMORY
    return not (stage is Stage.DECODING and fault in _NOT_ANY_MORE)


def write_table(outcomes: Sequence[Outcome], path: Path = TABLE) -> None:
    """Written anew after each row. Rows that were not run keep what their last run found; never run ones are absent."""
    found = _read_table(path) | {outcome.row: _line(outcome) for outcome in outcomes}
    lines = [found[row] for row in rows(only_sample=False) if row in found]
    head = _HEAD.format(num=len(lines), machine=f"{os.cpu_count()} cores, {platform.system()}")
    path.write_text("\n".join([head, *lines]) + "\n")


def _read_table(path: Path) -> dict[Row, str]:
    known = {(row.transport, row.stage.value, row.fault): row for row in rows(only_sample=False)}
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        cells = tuple(cell.strip() for cell in line.split("|")[1:4])
        if cells in known:
            found[known[cells]] = line  # type: ignore[index]
    return found


def _line(outcome: Outcome) -> str:
    row, within_s = outcome.row, FAULTS[outcome.row.fault].within_s
    verdict = outcome.what if outcome.holds else f"**does not hold**: {outcome.what}"
    pause, whole = (_seconds(each) for each in (outcome.pause_s, outcome.whole_s))
    cells = (row.transport, row.stage.value, row.fault, verdict, pause, f"{within_s:.0f} s", whole)
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


_HEAD = """\
# What a client sees when something dies

{num} rows, each as its last run found it; `make faults` runs them all and writes this page
(`tests/faults/test_matrix.py`). The bound is a promise; the times are what was seen on {machine}, shared with other
work.

Two prefill workers (P), two decode workers (D), the router and Redis are processes; a proxy stands in front of each
worker. Payloads travel inside gRPC's messages (`grpc`), or D copies them out of P's memory and only their places travel
(`shm`; there, only what can be otherwise is a row). The model is float32 with random weights; the prompt has 1,500
tokens, the answer 120, sampled from a seed with a frequency penalty.

A row holds if the client's tokens are those of an engine that nobody disturbs, no error comes, the client has its
answer within the bound, and afterwards every worker serves, the ledger has no open hand-off, every block is free or
cached, and the same prompt, now served from what is cached, begins with the same tokens. (A router's death ends its
clients' connections: there the rest must hold.) Where D is lost before it has adopted, "computed once" says that the
prefill workers have computed 1,500 prompt tokens in all, and the other D none. A row that does not hold says so.

How a stage is reached: *queued*: the prefill worker is stopped with the prompt in its socket; *prefilling*: the offer
is held up on its way to D; *streaming*: some blocks have passed (100 KB, or 4 KB of places), the rest is held up;
*sealed*: likewise, and the client has the first token; *decoding*: the client has four tokens.

Some faults at length. *Out of memory*: from then on the system gives that worker not a page more (`RLIMIT_DATA`), so
that any step, message or thread of it may fail. What the out-of-memory killer does is "killed". *Redis out of memory*:
it refuses every write, as at its `maxmemory`. *Disk full*: no process can write to a file: no log is written, and
Redis, which was told to save and cannot, refuses every write. Both last until Redis knows no worker any more, and a
second request is answered meanwhile. A D that is *stopped* wakes up when other prompts have taken the place of the
blocks that it still meant to copy (`shm`). A router out of memory is not a row: an answer that it cannot send for want
of memory ends, as at its death.

The outcome names the router's steps. The pause is the client's longest wait for a token from the fault on. All is well
when nothing of the request or the fault is left: workers let go of what a dead router held five seconds after its
connection ends, without waiting for the lease.

| payloads | stage | fault | outcome | pause | bound | all well after |
|---|---|---|---|---|---|---|"""
