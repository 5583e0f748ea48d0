"""Finding checkpoints: folders as they are, hub names through huggingface_hub (whose network is replaced here)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import card_files, locate, locate_tokenizer
from proto.errors import CheckpointError
from proto.settings import ModelSettings

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """Answers ``snapshot_download`` and remembers how it was asked."""

    def __init__(self, folder: Path | Exception) -> None:
        self.folder = folder
        self.asked: dict[str, Any] = {}

    def __call__(self, name: str, **how: Any) -> str:
        self.asked = {"name": name, **how}
        if isinstance(self.folder, Exception):
            raise self.folder
        return str(self.folder)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Hub:
    fake = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate(ModelSettings(model=str(tmp_path))) == tmp_path
    assert locate_tokenizer(ModelSettings(model=str(tmp_path)), tmp_path) == tmp_path


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hub(monkeypatch, tmp_path)
    settings = ModelSettings(model="owner/model", revision="v1", download_dir="/somewhere", hf_token="secret")
    assert locate(settings) == tmp_path
    assert (fake.asked["name"], fake.asked["revision"], fake.asked["cache_dir"]) == ("owner/model", "v1", "/somewhere")
    assert fake.asked["token"] == "secret"
    assert "*.safetensors" in fake.asked["allow_patterns"]
    assert "consolidated*" in fake.asked["ignore_patterns"]


def test_dummy_weights_and_tokenizers_download_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hub(monkeypatch, tmp_path)
    locate(ModelSettings(model="owner/model", load_format="dummy"))
    assert not any("safetensors" in pattern for pattern in fake.asked["allow_patterns"])
    locate_tokenizer(ModelSettings(model="owner/model", tokenizer="owner/tokenizer"), tmp_path)
    assert fake.asked["name"] == "owner/tokenizer"
    assert not any("safetensors" in pattern for pattern in fake.asked["allow_patterns"])


def test_what_the_hub_refuses_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, huggingface_hub.errors.LocalEntryNotFoundError("Got:\n  offline\n"))
    with pytest.raises(CheckpointError, match=r"owner/model.*: Got: offline$"):
        locate(ModelSettings(model="owner/model"))


@pytest.mark.parametrize("name", ["/absent/folder", "./absent", "a/b/c", "absent"])
def test_what_cannot_be_a_hub_name_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hub(monkeypatch, Path())
    with pytest.raises(CheckpointError, match="no folder"):
        locate(ModelSettings(model=name))
    assert not fake.asked


def test_card_files_come_from_both_folders(tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    for folder in (model, tokenizer):
        folder.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
            (folder / name).write_text(folder.name)
    files = card_files(model, tokenizer)
    assert files == {"config.json": b"model", "generation_config.json": b"model", "tokenizer.json": b"tokenizer"}
