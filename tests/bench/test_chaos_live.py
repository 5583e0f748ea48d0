"""A short storm on a real stack: 2P2D and Redis as processes that die and stop under load, on a network that fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chaos.faults import FaultKind
from bench.chaos.settings import ChaosSettings
from proto.errors import SettingsError
from tandem.chaos import Chaos, chaos_settings, main, stack_settings
from tandem.machine import Machine
from tandem.options import SERVE, build_parser, resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import stack_settings as small_stack

STORM = ChaosSettings(
    seed=61524,
    storm_s=7.0,
    fault_every_s=1.2,
    concurrency=4,
    num_questions=10,
    prompt_lens=(4, 400),
    output_lens=(4, 48),
)
"""This seed begins with bits flipped, a prefill worker cut off from the router, one with silence between them, and a
decode worker killed."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chaos"), "llama")


async def test_a_short_storm_costs_time_and_nothing_else(checkpoint: Path) -> None:
    lines: list[str] = []
    chaos = Chaos(
        small_stack(checkpoint, prefill=2, decode=2),
        Machine(cores=2),
        STORM,
        say=lambda name, line: lines.append(f"{name}: {line}"),
        note=lines.append,
    )
    await chaos.start()
    try:
        async with asyncio.timeout(200):
            await chaos.run()
    finally:
        await chaos.stop()
    report = chaos.report
    assert report is not None
    assert report.is_clean, "\n".join([report.text(), *lines])
    assert len(report.answers) > len(report.calm) == 10
    kinds = [done.fault.kind for done in report.faults]
    assert kinds[:3] == [FaultKind.FLIP, FaultKind.CUT_ROUTER_PREFILL, FaultKind.SILENCE_ROUTER_PREFILL]
    assert report.num_flipped > 0


def resolved(*argv: str, **environ: str) -> object:
    return resolve(SERVE, build_parser(SERVE, "tandem bench chaos", "").read(argv), environ)


def test_the_stack_is_two_of_each_in_float32_unless_told_otherwise(checkpoint: Path) -> None:
    settings = stack_settings(resolved(str(checkpoint)))  # type: ignore[arg-type]
    assert (settings.local.prefill, settings.local.decode) == (2, 2)
    assert settings.engine.model.dtype == "float32"
    assert settings.router.disagg_threshold == 0
    told = stack_settings(resolved(str(checkpoint), "--decode=3", "--dtype=bfloat16", "--disagg-threshold=64"))  # type: ignore[arg-type]
    assert (told.local.prefill, told.local.decode, told.engine.model.dtype) == (2, 3, "bfloat16")
    assert told.router.disagg_threshold == 64


@pytest.mark.parametrize("flag", ["--api-key=k", "--redis=redis://elsewhere"])
def test_a_stack_that_is_not_private_is_refused(checkpoint: Path, flag: str) -> None:
    with pytest.raises(SettingsError, match="private"):
        stack_settings(resolved(str(checkpoint), flag))  # type: ignore[arg-type]


def test_flags_become_settings() -> None:
    from tandem.chaos import _parser

    given = _parser().read(["--minutes=0.5", "--chaos-seed=9", "--questions=5", "--concurrency=2", "--fault-every=1"])
    wanted = ChaosSettings(seed=9, storm_s=30.0, fault_every_s=1.0, concurrency=2, num_questions=5)
    assert chaos_settings(given) == replace(wanted)
    with pytest.raises(SettingsError, match="above 0"):
        main(["--minutes=0"])


def test_help_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--chaos-seed" in capsys.readouterr().out
