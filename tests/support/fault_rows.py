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
LET_GO_S = 15.0
"""From a fault's end, or the answer's if that is later, until those that it left alive hold nothing any more. Less than
what is left of a lease: 20 s, since it is for 30 s and renewed every 10."""
_BETWEEN_P_AND_D = (Stage.PREFILLING, Stage.STREAMING, Stage.SEALED)
"""The stages in which blocks are, or should be, on their way."""
_D_HAS_ALL = (Stage.ADOPTED, Stage.DECODING)
_NOT_ANY_MORE = {"P-D cut", "P-D silent", "P-D slow", "payload bits flipped"}
"""Between P and D nothing is on its way once D has it all."""
_NOT_YET = {
    *_NOT_ANY_MORE,
    *(f"router-{side} {how}" for side in "PD" for how in ("cut", "silent", "slow")),
    *(f"{side} out of memory" for side in "PD"),
}
"""What the router has half of is on no other way, and needs no worker's memory."""
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
_D_LOST_TO_ROUTER = {"router-D cut", "D out of memory"}
"""P may have handed over to it all the same."""


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
        is_cut_early = self.stage in (Stage.PREFILLING, Stage.STREAMING) and self.fault == "router-D cut"
        return is_cut_early or (self.stage in _BETWEEN_P_AND_D and self.fault in _D_LOST_TO_P)

    @property
    def may_be_computed_once(self) -> bool:
        """Whether P must do so if it is told to before D has adopted."""
        return self.stage in _BETWEEN_P_AND_D and self.fault in _D_LOST_TO_ROUTER


@dataclass(slots=True)
class Outcome:
    row: Row
    holds: bool = False
    what: str = ""
    pause_s: float | None = None
    """The client's longest wait for a token, from the fault on."""
    whole_s: float | None = None
    """Until every worker is back, the ledger is closed and every block is given back."""


SAMPLE = {
    Row(GRPC, Stage.QUEUED, "P killed"),
    Row(GRPC, Stage.STREAMING, "payload bits flipped"),
    Row(GRPC, Stage.STREAMING, "Redis out of memory"),
    Row(GRPC, Stage.SEALED, "D killed"),
    Row(GRPC, Stage.ADOPTED, "D killed"),
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
    return [row for row in every if row in SAMPLE] if only_sample else every


def _applies(transport: str, stage: Stage, fault: str) -> bool:
    if transport == SHM:
        return stage in _BETWEEN_P_AND_D and fault in _ON_SHARED_MEMORY
    if stage is Stage.RECEIVED:
        return fault not in _NOT_YET
    return not (stage in _D_HAS_ALL and fault in _NOT_ANY_MORE)


def write_table(outcomes: Sequence[Outcome], path: Path = TABLE) -> None:
    """Written anew after each row. Rows that were not run keep what their last run found; never run ones are absent."""
    found = _read_table(path) | {outcome.row: _line(outcome) for outcome in outcomes}
    lines = [found[row] for row in rows(only_sample=False) if row in found]
    head = _HEAD.format(num=len(lines), machine=f"{os.cpu_count()} cores, {platform.system()}", let_go=LET_GO_S)
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

Two prefill workers (P), two decode workers (D), the router and Redis are processes; a proxy stands in front of Redis
and of each worker. Payloads travel inside gRPC's messages (`grpc`), or D copies them out of P's memory and only their
places travel (`shm`; there, only what can be otherwise is a row). The model is float32 with random weights; the prompt
has 1,500 tokens, the answer 120, sampled from a seed with frequency, presence and repetition penalties.

A row holds if the client's tokens are those of an engine that nobody disturbs, no error comes, the client has its
answer within the bound, and afterwards every worker serves, the ledger has no open hand-off, every block is free or
cached, and the same prompt, now served from what is cached, begins with the same tokens. (A router's death ends its
clients' connections: there the rest must hold.) A row that does not hold says so.

Within {let_go:.0f} s of the answer and the end of the fault, the ledger has no open hand-off, and every worker that the
fault has left alive holds no block for anybody, or the row does not hold: nothing waits for a lease, of which 20 s are
left at least. What a dead router held, say, is let go five seconds after its connection ends. All is well when the
processes that ended serve again, too.

Where D is lost before it has adopted, "computed once" says that the prefill workers have computed 1,500 prompt tokens
in all, and the other D none. It must be so where P has lost D, and where the router is cut off from D while the prompt
is computed. A D that the router loses later, or that is out of memory, may have adopted all the same, and the request
resumes; where it is only redirected, it must be computed once.

How a stage is reached: *received*: the router has half of the request's body; *routed*: the prefill worker is stopped
with the prompt in its socket; *queued*: the prefill worker's memory is full of another prompt, which is held up on its
way and whose client leaves after the fault; *prefilling*: the offer is held up on its way to D; *streaming*: some
blocks have passed (100 KB, or 4 KB of places), the rest is held up; *sealed*: likewise, and the client has the first
token; *adopted*: D has all blocks, and what the router tells it is held up; *decoding*: the client has four tokens.
Each time the ledger has the request in that very stage (but for *received*: what nobody was chosen for is not on the
ledger).

Which faults a stage does not have: what is *received* is on no way between two of them and needs no worker's memory, so
there are no rows of networks between router, P and D, nor of P or D out of memory; any P and D are killed or stopped
then. Once D has *adopted*, nothing is on its way from P.

Some faults at length. *Out of memory*: from then on the system gives that worker not a page more (`RLIMIT_DATA`), so
that any step, message or thread of it may fail. What the out-of-memory killer does is "killed". *Redis out of memory*:
it refuses every write, as at its `maxmemory`. *Disk full*: no process can write to a file: no log is written, and
Redis, which was told to save and cannot, refuses every write. *Redis cut*, *silent*: so is everybody's way to it. All
four last until Redis knows no worker any more, and a second request is answered meanwhile. A whole minute without Redis
is a test of its own (`tests/faults/test_long_absence.py`, run by `make faults`, too). *Slow*: each piece of up to 16 KB
comes 20 ms late, to and from Redis 400 ms. A D that is *stopped* wakes up when other prompts have taken the place of
the blocks that it still meant to copy (`shm`). A *router stopped* sleeps until the workers have given it up and have
let go of everything; only then it wakes up, and the bound begins. A router out of memory is not a row: an answer that
it cannot send for want of memory ends, as at its death.

Beside the rows: bfloat16 with `--batch-invariant`, and an answer that ends at a stop string, over the death of P and of
D (`tests/faults/test_invariant_answers.py`); an engine that hangs in a step (`tests/faults/test_hanging_step.py`).

The outcome names the router's steps; at *queued*, those for the other prompts, too. The pause is the client's longest
wait for a token from the fault on.

| payloads | stage | fault | outcome | pause | bound | all well after |
|---|---|---|---|---|---|---|"""
