"""Reading checkpoints: shards, dtypes, digests, and errors that name the file and the tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.weights import DummySource, MeasuringSource, SafetensorsSource, stored_dtype
from proto.errors import CheckpointError
from tests.support.checkpoints import make_checkpoint

CPU = torch.device("cpu")
QUERY, KEY = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")


def source(folder: Path, dtype: torch.dtype = torch.float32) -> SafetensorsSource:
    return SafetensorsSource(folder, dtype, CPU)


def digest(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    taken = source(folder, dtype)
    taken.take([QUERY, KEY], (96, 64))
    taken.take(["model.norm.weight"], (64,))
    return taken.digest("spec")


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    whole, shards = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", num_shards=3)
    stored = load_file(whole / "model.safetensors")
    for folder in (whole, shards):
        fused = source(folder).take([QUERY, KEY], (96, 64))
        assert torch.equal(fused, torch.cat((stored[QUERY], stored[KEY])))
    assert digest(whole) == digest(shards)


def test_parts_are_the_whole_in_pieces_and_the_whole_is_a_copy(tmp_path: Path) -> None:
    opened = source(make_checkpoint(tmp_path))
    parts = opened.parts([QUERY, KEY], (96, 64))
    assert [part.shape[0] for part in parts] == [64, 32]
    assert torch.equal(torch.cat(list(parts)), opened.take([QUERY, KEY], (96, 64)))
    opened.take([QUERY], (64, 64)).zero_()
    assert opened.take([QUERY], (64, 64)).any()
    digests = [opened.digest("spec"), digest(tmp_path)]
    assert digests[0] != digests[1], "the norm was not taken here"


def test_measuring_counts_and_allocates_nothing() -> None:
    measured = MeasuringSource(torch.bfloat16)
    assert measured.take(["a"], (1 << 40, 1 << 10)).untyped_storage().nbytes() == 2
    assert [part.shape for part in measured.parts(["b", "c"], (6, 4))] == [(6, 4)]
    assert measured.num_parameters == (1 << 50) + 24


def test_any_safetensors_file_will_do_but_the_consolidated_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    save_file({QUERY: torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert source(tmp_path).take([QUERY], (64, 64)).any()


def test_converts_to_the_dtype_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16")
    assert stored_dtype(tmp_path) == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")[QUERY]
    wide = source(tmp_path).take([QUERY], (64, 64))
    assert wide.dtype == torch.float32
    assert torch.equal(wide, stored.float())


def test_digest_tells_models_apart(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", seed=1)
    assert digest(first) == digest(make_checkpoint(tmp_path / "c"))
    assert digest(first) != digest(second)
    assert digest(first) != digest(first, torch.bfloat16)
    tensors = load_file(first / "model.safetensors")
    tensors["model.norm.weight"][63] += 1e-3
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    assert digest(first) != digest(tmp_path / "c")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.7\.nothing"):
        source(tmp_path).take(["model.layers.7.nothing"], (1,))


def test_a_wrong_shape_names_file_tensor_and_both_shapes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*q_proj.*\[64, 64\].*asks for \[128, 64\]"):
        source(tmp_path).take([QUERY], (128, 64))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=2)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in weight_map.items() if file == "model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    opened = source(tmp_path)
    with pytest.raises(CheckpointError, match=rf"no file model-00002-of-00002\.safetensors.*{re.escape(name)}"):
        opened.take([name], (1,))


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        source(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        source(tmp_path)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    save_file({QUERY: torch.zeros(64, 64, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantised"):
        source(tmp_path).take([QUERY], (64, 64))


def test_dummy_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (DummySource(seed, torch.float32, CPU) for seed in (0, 0, 1))
    shape = (1200, 900)
    a = first.take(["a.weight"], shape)
    again.take(["b.weight"], (3, 5))
    assert torch.equal(a, again.take(["a.weight"], shape))
    assert not torch.equal(a, other.take(["a.weight"], shape))
    assert not torch.equal(a, first.take(["c.weight"], shape))
    assert float(a.std()) == pytest.approx(1.6 / 30, rel=0.02)
    assert torch.unique(a[:, 0]).numel() > 1100
    assert first.take(["x.norm.weight"], (4,)).tolist() == [1, 1, 1, 1]
    assert first.digest("s") != other.digest("s")
