"""``tandem bench gpu``: measures section by section, and keeps what there is after each."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.figures import Entry, Figure, Missing, Section, table, to_json
from bench.options import Parser
from proto.errors import SettingsError
from router.values import JsonObject

if TYPE_CHECKING:
    from bench.gpu.lab import Lab

SECTIONS = {
    "decode": ("decode attention", "attention:measure_decode"),
    "chunks": ("attention of chunks", "attention:measure_chunks"),
    "steps": ("whole steps", "steps:measure"),
    "fp8": ("fp8 weights", "steps:measure_fp8"),
    "handoff": ("a hand-off between two processes", "handoff:measure"),
    "bits": ("the same bits, and what they cost", "exact:measure_bits"),
    "exact": ("the same tokens as on a CPU", "exact:measure_tokens"),
    "stack": ("the whole stack", "stack:measure"),
    "peer": ("against transformers' continuous batching", "peers:measure"),
}
"""What each is called, and the module and function that measure it."""


def main(argv: Sequence[str]) -> int:
    """0; 1 where something failed that could have been measured. Raises SettingsError."""
    parser = Parser("tandem bench gpu", description="Measures this machine's GPU as Tandem uses it.")
    names = ", ".join(SECTIONS)
    parser.add_argument("--only", action="append", choices=list(SECTIONS), metavar="SECTION", help=f"of {names}")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; without a GPU on Triton's interpreter")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also written here, after every section")
    given = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        if not given.toy:
            raise SettingsError("torch finds no CUDA device here; --toy runs everything without one.")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's kernels are imported, below
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from bench.gpu.lab import open_lab
    from bench.gpu.sizes import FULL, TOY

    with tempfile.TemporaryDirectory() as scratch:
        lab = open_lab(device, TOY if given.toy else FULL, Path(scratch))
        about = _about(lab)
        done: list[Section] = []
        for name in given.only or SECTIONS:
            done.append(_measured(name, lab))
            if given.out is not None:
                given.out.write_text(json.dumps(to_json(about, done), indent=2) + "\n")
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['sizes']} sizes\n")
    print(table(done))
    entries = [entry for section in done for entry in section.entries]
    return 1 if any(isinstance(entry, Missing) and entry.is_fault for entry in entries) else 0


def _measured(name: str, lab: Lab) -> Section:
    from bench.gpu.lab import free_memory

    began = time.monotonic()
    entries: list[Entry] = []
    try:
        for entry in _section(name)(lab):
            if isinstance(entry, Figure) and entry.goal is not None and entry.goal.of_time and not lab.is_gpu:
                entry = replace(entry, goal=None)  # an interpreter's times mean nothing
            entries.append(entry)
            shown = f"{entry.value:.5g} {entry.unit}" if isinstance(entry, Figure) else entry.why
            print(f"{name}: {entry.case}: {shown}", file=sys.stderr, flush=True)
    except Exception as error:  # the other sections can be measured all the same
        traceback.print_exc()
        entries.append(Missing("the rest", f"{type(error).__name__}: {error}", is_fault=True))
    free_memory()
    return Section(SECTIONS[name][0], tuple(entries), time.monotonic() - began)


def _section(name: str) -> Callable[[Lab], Iterator[Entry]]:
    """Loaded when it is wanted: one may lack a package that the others do not need."""
    module, function = SECTIONS[name][1].split(":")
    found: Callable[[Lab], Iterator[Entry]] = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    return found


def _about(lab: Lab) -> JsonObject:
    from importlib.metadata import version

    import torch

    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(lab.device) if lab.is_gpu else "CPU, Triton interpreted",
        "torch": torch.__version__,
        "triton": version("triton"),
        "sizes": lab.sizes.name,
        "copy_bytes_per_s": lab.ceilings.bytes_per_s,
        "product_flops_per_s": lab.ceilings.flops_per_s,
    }
