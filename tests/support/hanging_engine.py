"""A worker whose engine hangs in the middle of a step for as long as a file is there.

    python -m tests.support.hanging_engine FILE ROLE

Everything else of the process goes on: its event loop answers probes, and its streams stay up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import worker.host
from engine.batch import StepBatch
from engine.build import EngineParts, load_engine_parts
from engine.stepper import Pending, RunnerLike
from proto.settings import EngineSettings
from tandem.cli import main

FILE, ROLE = Path(sys.argv[1]), sys.argv[2]
_LOOK_EVERY_S = 0.02


class HangingRunner:
    def __init__(self, runner: RunnerLike) -> None:
        self._runner = runner

    def submit(self, batch: StepBatch) -> Pending:
        while FILE.exists():
            time.sleep(_LOOK_EVERY_S)
        return self._runner.submit(batch)


def load_hanging_parts(settings: EngineSettings, on_phase: Callable[[str, float], None] | None = None) -> EngineParts:
    parts = load_engine_parts(settings, on_phase)
    return replace(parts, runner=HangingRunner(parts.runner))  # type: ignore[arg-type]


if __name__ == "__main__":
    worker.host.load_engine_parts = load_hanging_parts
    sys.exit(main([ROLE]))
