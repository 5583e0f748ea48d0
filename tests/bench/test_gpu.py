"""The measurements of a GPU, at toy size: on Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import json
import sys
import time
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import command
from bench.gpu import attention, exact, flashinfer_peer
from bench.gpu.attention import make_paged
from bench.gpu.command import SECTIONS
from bench.gpu.engines import opened, settings
from bench.gpu.figures import Figure, Goal, Missing, Section, table, to_json
from bench.gpu.lab import Lab, open_lab
from bench.gpu.sizes import TOY, Chunks
from proto.errors import SettingsError
from proto.ids import RequestId
from proto.layout import FP8
from proto.request import TokenLogprobs, TokenOut

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
    if name == "handoff":
        beside = measured[-1]
        assert beside["case"].startswith("a decode step of 2 while hand-offs bring")
        assert beside["ratio"] > 0
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


@pytest.mark.parametrize("cached", [0, 4])
def test_torch_may_share_heads_or_repeat_them(cached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []

    def attend(query: Tensor, keys: Tensor, values: Tensor, *, enable_gqa: bool, **options: object) -> Tensor:
        asked.append((enable_gqa, keys.shape[1]))
        time.sleep(0.0 if enable_gqa else 0.005)
        return query

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    lab = open_lab(torch.device("cpu"), replace(TOY, chunks=(Chunks("few", 1, 4, cached),)), tmp_path)
    *_, last = attention.measure_chunks(lab)
    assert isinstance(last, Figure)
    assert set(asked) == {(True, TOY.attention.kv_heads), (False, TOY.attention.heads)}
    assert "heads repeated" not in last.of


def greedy(*tokens: int, lead: float = 1.0) -> list[TokenOut]:
    """Token 9 is each time the second likeliest, ``lead`` behind the first."""
    return [
        TokenOut(RequestId("r"), 0, position, token, TokenLogprobs(-0.5, 1, ((token, -0.5), (9, -0.5 - lead))))
        for position, token in enumerate(tokens)
    ]


class TestWhereTokensPart:
    """A near tie may fall either way; anything else is a fault."""

    @pytest.mark.parametrize(
        ("found", "right", "part", "holds"),
        [
            (greedy(1, 2, 3), greedy(1, 2, 3), "nowhere", True),
            (greedy(1, 9, 4), greedy(1, 2, 3, lead=1e-4), "prompt 0 at 1: 0.0001", True),
            (greedy(1, 9, 4), greedy(1, 2, 3, lead=0.25), "prompt 0 at 1: 0.25", False),
            (greedy(7, 2, 3), greedy(1, 2, 3, lead=1e-4), "prompt 0 at 0: inf", False),
        ],
    )
    def test_the_gap_decides(self, found: list[TokenOut], right: list[TokenOut], part: str, holds: bool) -> None:
        tokens, gap, *errors = exact.compare("model", [found], [right])
        assert isinstance(tokens, Figure)
        assert isinstance(gap, Figure)
        num_same = {"nowhere": 3, "prompt 0 at 1": 1, "prompt 0 at 0": 0}[part.split(":")[0]]
        assert (tokens.value, tokens.ratio, tokens.holds) == (3, num_same / 3, None)
        assert (gap.case, gap.holds) == (f"model: where tokens part ({part})", holds)
        assert len(errors) == (num_same > 0)


class TestFlashInfer:
    """Made up: it compiles what it runs, so it may fail in any manner, and ours is judged by the faster of its ways."""

    @pytest.fixture
    def lab(self, tmp_path: Path) -> Lab:
        return open_lab(torch.device("cpu"), TOY, tmp_path)

    @pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), (FP8, torch.float8_e4m3fn)])
    def test_the_faster_way_counts(
        self, lab: Lab, dtype: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planned: list[FakeDecode] = []
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer(planned))
        paged = make_paged(lab, [(1, TOY.decode_context - 1)] * 3, dtype)
        [figure] = flashinfer_peer.compare(lab, "FlashInfer", paged, 1.0)
        assert isinstance(figure, Figure)
        assert figure.unit == "µs (without tensor cores)"
        assert [each.use_tensor_cores for each in planned] == [True, False]
        for each in planned:
            starts, blocks, lasts = (numbers.tolist() for numbers in each.numbers)
            assert tuple(tuple(blocks[a:b]) for a, b in pairwise(starts)) == paged.tables
            assert lasts == [16] * 3, "all of the last block's tokens"
            assert each.types == (torch.bfloat16, stored)
            assert each.caches[0].shape == (9, 16, TOY.attention.kv_heads, TOY.attention.head_dim)
            assert each.caches[0].dtype == stored

    @pytest.mark.parametrize("fault", [AssertionError("sm_90a"), TypeError("plan()"), CalledProcessError(1, "ninja")])
    def test_whatever_fails_in_it_is_said(self, lab: Lab, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer([], fault))
        paged = make_paged(lab, [(1, TOY.decode_context - 1)], "bfloat16")
        with_cores, without = flashinfer_peer.compare(lab, "FlashInfer", paged, 1.0)
        assert isinstance(with_cores, Missing)
        assert (with_cores.case, with_cores.why) == (
            "FlashInfer, with tensor cores",
            f"{type(fault).__name__}: {fault}",
        )
        assert isinstance(without, Figure), "the other way is measured all the same"
        monkeypatch.setitem(sys.modules, "flashinfer", None)
        missing = list(flashinfer_peer.compare(lab, "FlashInfer", paged, 1.0))
        assert [isinstance(each, Missing) and each.why.split(":")[0] for each in missing] == ["ModuleNotFoundError"] * 2


def fake_flashinfer(made: list[FakeDecode], fault: Exception | None = None) -> SimpleNamespace:
    """``fault`` is met with tensor cores."""

    def decode(workspace: Tensor, order: str, *, use_tensor_cores: bool) -> FakeDecode:
        assert (workspace.dtype, order) == (torch.uint8, "NHD")
        made.append(FakeDecode(use_tensor_cores, fault if use_tensor_cores else None))
        return made[-1]

    return SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=decode)


class FakeDecode:
    """Takes longer with tensor cores."""

    def __init__(self, use_tensor_cores: bool, fault: Exception | None) -> None:
        self.use_tensor_cores = use_tensor_cores
        self._fault = fault

    def plan(
        self,
        starts: Tensor,
        blocks: Tensor,
        lasts: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        shape = TOY.attention
        assert (heads, kv_heads, head_dim, block_size) == (shape.heads, shape.kv_heads, shape.head_dim, 16)
        self.numbers = (starts, blocks, lasts)
        self.types = (q_data_type, kv_data_type)

    def run(self, query: Tensor, caches: tuple[Tensor, Tensor]) -> None:
        if self._fault is not None:
            raise self._fault
        self.caches = caches
        time.sleep(0.02 if self.use_tensor_cores else 0.0)
