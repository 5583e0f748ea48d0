"""Building an engine from settings: phases, facts, the model card, and errors before anything large is loaded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import machine
from engine.batch import Row, StepBatch
from engine.build import EngineParts, load_engine_parts
from engine.weights import DummySource, SafetensorsSource
from proto.errors import CheckpointError, DoesNotFit, SettingsError
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tests.support.checkpoints import make_checkpoint
from tests.support.driving import greedy

CACHE = CacheSettings(num_gpu_blocks_override=64)


def settings(folder: Path | str, cache: CacheSettings = CACHE, **model: Any) -> EngineSettings:
    return EngineSettings(
        model=ModelSettings(model=str(folder), device="cpu", **model),
        cache=cache,
        scheduler=SchedulerSettings(max_num_seqs=8),
    )


def build(folder: Path, cache: CacheSettings = CACHE, **model: Any) -> EngineParts:
    parts = load_engine_parts(settings(folder, cache, **model))
    parts.kv.close()
    return parts


def first_token(parts: EngineParts) -> int:
    [[sampled]] = parts.runner.run(StepBatch((Row([5, 6, 7], 0, [3], (greedy(),)),)))
    return sampled.token


def test_facts_card_and_phases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path, generation_config={"eos_token_id": [1, 3], "temperature": 0.6})
    phases: list[str] = []
    with caplog.at_level(logging.INFO):
        parts = load_engine_parts(settings(tmp_path), lambda name, seconds: phases.append(name))
    parts.kv.close()
    assert phases == ["find", "weights", "memory", "warmup"]
    assert "CPU KV cache size: 1,024 tokens" in caplog.text
    assert "Maximum concurrency for 1,024 tokens per request: 1.00x" in caplog.text
    facts, card = parts.facts, parts.card
    assert (facts.num_blocks, facts.max_model_len, facts.max_num_seqs) == (64, 1024, 8)
    assert facts.eos_token_ids == card.eos_token_ids == (1, 3)
    assert facts.layout.dtype == "float32"
    assert "threads" in facts.numerics
    assert card.served_names == (str(tmp_path),)
    assert card.layout == facts.layout.fingerprint()
    assert card.digest == facts.layout.model_digest
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(card.files) == names
    assert json.loads(card.files["generation_config.json"])["temperature"] == 0.6
    assert not parts.kv.paged.data.any(), "the warm-up left something in the KV memory"


def test_dtype(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16")
    assert build(tmp_path).facts.layout.dtype == "bfloat16"
    assert build(tmp_path, dtype="float").facts.layout.dtype == "float32"
    assert build(tmp_path, dtype="half").facts.layout.dtype == "float16"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build(tmp_path).facts.layout.dtype == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    with pytest.raises(SettingsError, match="float64"):
        build(tmp_path)


def test_fp8_keys_and_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    plain, fp8 = build(tmp_path), build(tmp_path, replace(CACHE, kv_cache_dtype="fp8"))
    assert fp8.facts.layout.dtype == "float8_e4m3fn"
    assert fp8.facts.layout.fingerprint() != plain.facts.layout.fingerprint()
    assert fp8.hasher.full_blocks(range(16)) != plain.hasher.full_blocks(range(16))
    size = CacheSettings(kv_cache_memory_bytes=1 << 20)
    more = build(tmp_path, replace(size, kv_cache_dtype="fp8_e4m3")).facts.num_blocks
    assert more == build(tmp_path, size).facts.num_blocks * 16 * 4 // (16 + 4)


def test_attention_that_there_is_not_is_an_error_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SettingsError, match=r"attention_backend triton.*not on cpu"):
        build(tmp_path, attention_backend="triton")
    assert "torch attention" in build(tmp_path, attention_backend="torch").facts.numerics


def test_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        parts = build(make_checkpoint(tmp_path), threads=2)
        assert torch.get_num_threads() == 2
        assert "2 threads" in parts.facts.numerics
    finally:
        torch.set_num_threads(before)


def test_threads_that_nobody_names_are_torchs_own_but_for_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("engine.loading.usable_cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert "2 threads" in build(make_checkpoint(tmp_path)).facts.numerics
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert "1 threads" in build(tmp_path).facts.numerics
    finally:
        torch.set_num_threads(before)


def test_equal_checkpoints_share_blocks_and_others_do_not(tmp_path: Path) -> None:
    same = [build(make_checkpoint(tmp_path / name)) for name in "ab"]
    other = build(make_checkpoint(tmp_path / "c", seed=1))
    tokens = list(range(16))
    hashes = [parts.hasher.full_blocks(tokens) for parts in (*same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert same[0].facts.layout.fingerprint() == same[1].facts.layout.fingerprint() != other.facts.layout.fingerprint()
    keyed = build(tmp_path / "a", CacheSettings(num_gpu_blocks_override=64, prefix_hash_key="secret" * 20))
    assert keyed.hasher.full_blocks(tokens) != hashes[0]
    assert keyed.card.hash_namespace == same[0].card.hash_namespace


def test_dummy_weights_need_only_the_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    parts = [build(tmp_path, load_format="dummy", seed=seed) for seed in (0, 0, 1)]
    digests = [p.facts.layout.model_digest for p in parts]
    assert digests[0] == digests[1] != digests[2]
    assert first_token(parts[0]) == first_token(parts[1])


def test_another_tokenizer_may_be_named(tmp_path: Path) -> None:
    model, tokenizer = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    (tokenizer / "chat_template.jinja").write_text("other")
    (tokenizer / "config.json").unlink()
    card = build(model, tokenizer=str(tokenizer), served_model_name=("x", "y")).card
    assert card.files["chat_template.jinja"] == b"other"
    assert card.files["config.json"] == (model / "config.json").read_bytes()
    assert card.served_names == ("x", "y")


def test_a_prompt_of_the_whole_context_runs(tmp_path: Path) -> None:
    parts = build(make_checkpoint(tmp_path, max_position_embeddings=64), CacheSettings(num_gpu_blocks_override=4))
    assert parts.facts.max_model_len == 64
    [[sampled]] = parts.runner.run(StepBatch((Row([5] * 64, 0, [0, 1, 2, 3], (greedy(),)),)))
    assert 0 <= sampled.token < parts.facts.vocab_size


def test_errors_say_what_to_change(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    with pytest.raises(SettingsError, match="No model given"):
        load_engine_parts(EngineSettings())
    with pytest.raises(CheckpointError, match="no folder"):
        build(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        build(tmp_path)
    with pytest.raises(SettingsError, match="made for"):
        build(tmp_path / "m", max_model_len=5000)
    with pytest.raises(DoesNotFit, match="At most 32 tokens"):
        build(tmp_path / "m", CacheSettings(num_gpu_blocks_override=2), max_model_len=64)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_do_not_fit_are_refused_before_any_is_read(
    load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, dtype="bfloat16", tie_word_embeddings=False)
    stored = load_file(folder / "model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in stored.values())
    taken: list[object] = []
    monkeypatch.setattr(SafetensorsSource, "parts", lambda *given: taken.append(given))
    monkeypatch.setattr(DummySource, "take", lambda *given: taken.append(given))
    monkeypatch.setattr(machine, "available_memory", lambda device: 4 * num_parameters - 1)
    expected = rf"{num_parameters:,} parameters x 4 bytes \(float32\) = 0\.\d MiB; 0\.\d MiB of memory are available"
    with pytest.raises(DoesNotFit, match=expected):
        build(folder, dtype="float32", load_format=load_format)
    assert not taken


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors"):
        build(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no CUDA device"):
        load_engine_parts(EngineSettings(model=ModelSettings(model=str(make_checkpoint(tmp_path)), device="cuda")))


def test_product_code_imports_neither_transformers_nor_the_hub() -> None:
    script = "import sys, engine.build; print(sorted({'transformers', 'huggingface_hub'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "[]"
