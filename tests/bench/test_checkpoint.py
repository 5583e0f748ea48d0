"""The checkpoint to measure with is one that `transformers` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import checkpoint
from bench.options import CheckpointWish, read_checkpoint
from bench.settings import SHAPES, Shape
from proto.errors import SettingsError

TINY = Shape(hidden=32, inner=64, layers=2, heads=4, kv_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_library_texts", lambda: iter([Path(checkpoint.__file__).read_text()]))
        checkpoint.write_checkpoint(folder, TINY, 400, seed=1)
    return folder


def test_transformers_loads_every_weight(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.config.vocab_size == 400
    assert torch.isfinite(model(torch.tensor([[7, 8, 9]])).logits).all()


def test_its_tokenizer_has_all_tokens_and_a_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer("def f():").input_ids) == "def f():"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>hi<|end|><|assistant|>"


def test_a_folder_with_something_in_it_is_left_alone(folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(SettingsError, match="not empty"):
        checkpoint.write_checkpoint(folder, TINY, 400, seed=1)
    assert sorted(folder.iterdir()) == before


def test_the_flags() -> None:
    wish = read_checkpoint(["d", "--shape", "1b", "--seed", "3"])
    assert wish == CheckpointWish(Path("d"), SHAPES["1b"], 32000, 3, has_weights=True)
    assert not read_checkpoint(["d", "--without-weights"]).has_weights
    with pytest.raises(SettingsError):
        read_checkpoint(["d", "--shape", "9t"])
