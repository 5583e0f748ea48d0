"""The measurements of a GPU, at toy size: on Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from bench import command
from bench.gpu.command import SECTIONS
from bench.gpu.engines import opened, settings
from bench.gpu.figures import Figure, Goal, Missing, Section, table, to_json
from bench.gpu.lab import open_lab
from bench.gpu.sizes import TOY
from proto.errors import SettingsError

pytest.importorskip("triton")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_runs_and_what_is_exact_holds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert command.main(["gpu", "--toy", "--only", name, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["sizes"] == "toy"
    assert result["copy_bytes_per_s"] > 0
    [section] = result["sections"]
    measured = [entry for entry in section["entries"] if "value" in entry]
    assert measured
    assert all(entry["holds"] for entry in measured if entry["goal"] is not None)
    assert not any(entry.get("is_fault") for entry in section["entries"])
    shown = capsys.readouterr().out
    assert all(f"| {entry['case']} |" in shown for entry in section["entries"])
    if name in ("decode", "chunks", "bits", "exact"):
        assert any(entry["goal"] is not None for entry in measured), "exactness is judged without a GPU too"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_real_sizes_are_refused() -> None:
    with pytest.raises(SettingsError, match="no CUDA device here; --toy"):
        command.main(["gpu"])
    with pytest.raises(SettingsError, match="invalid choice: 'frob'"):
        command.main(["gpu", "--only", "frob"])


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.gpu import steps

    def broken(lab: object) -> object:
        yield Figure("a case", 1.0, "ms")
        raise RuntimeError("out of luck")

    monkeypatch.setattr(steps, "measure_fp8", broken)
    out = tmp_path / "gpu.json"
    assert command.main(["gpu", "--toy", "--only", "fp8", "--only", "handoff", "--out", str(out)]) == 1
    fp8, handoff = json.loads(out.read_text())["sections"]
    assert [entry["case"] for entry in fp8["entries"]] == ["a case", "the rest"]
    assert fp8["entries"][1]["why"] == "RuntimeError: out of luck"
    assert handoff["entries"][0]["value"] > 0


def test_an_engine_leaves_no_memory_behind_whoever_still_has_a_name_for_it(tmp_path: Path) -> None:
    """The next one may need all of the device."""
    lab = open_lab(torch.device("cuda" if torch.cuda.is_available() else "cpu"), TOY, tmp_path)
    with opened(settings(lab)) as engine:
        left = [weakref.ref(engine.parts.kv), weakref.ref(engine.parts.runner), weakref.ref(engine.core)]
        assert all(each() is not None for each in left)
    assert [each() for each in left] == [None] * 3
    assert not vars(engine)


def test_goals_are_judged_and_shown() -> None:
    entries = (
        Figure("fast", 3.25, "ms", 0.9, "the roof", Goal(0.85)),
        Figure("slow", 12345.6, "ms", 1.5, "the floor", Goal(1.25, is_least=False)),
        Figure("plain", 0.5, "GB/s"),
        Missing("absent", "no | library\nhere"),
    )
    sections = [Section("some", entries, 1.23456)]
    assert table(sections).splitlines()[2:] == [
        "| **some** | | | | | |",
        "| fast | 3.25 ms | 0.900 | the roof | ≥ 0.85 | yes |",
        "| slow | 12,346 ms | 1.500 | the floor | ≤ 1.25 | **no** |",
        "| plain | 0.5 GB/s |  |  |  |  |",
        "| absent | left out: no / library here | | | | |",
    ]
    [shown] = to_json({"device": "d"}, sections)["sections"]  # type: ignore[misc, union-attr]
    assert [entry.get("holds") for entry in shown["entries"]] == [True, False, None, None]  # type: ignore[call-overload, index, union-attr]
