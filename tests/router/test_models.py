"""The served model follows the deployment's layout, and its tokenizer may come from elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest

from proto.errors import CheckpointError, NoWorker
from proto.hashing import BlockHasher, hash_key
from proto.settings import ModelSettings
from router.models import Models
from router.tokenizer import ServedModel
from tests.support.http import byte_level_json, model_card


async def test_nothing_is_served_before_a_card_is_known() -> None:
    models = Models(ModelSettings())
    models.serve("layout")
    with pytest.raises(NoWorker, match="no worker has been seen"):
        models.current()
    with pytest.raises(NoWorker):
        models.hasher("layout")


async def test_the_deployments_layout_decides() -> None:
    served: list[ServedModel] = []
    models = Models(ModelSettings(), on_served=served.append)
    await models.learn(model_card())
    await models.learn(dataclasses.replace(model_card(), layout="other", served_names=("second",)))
    assert models.knows("other")
    models.serve("layout")
    models.serve("layout")
    assert models.current().name == "tiny"
    models.serve("other")
    models.serve("unknown")
    assert models.current().name == "second"
    assert [each.name for each in served] == ["tiny", "second"]


async def test_hashes_are_keyed_by_the_secret() -> None:
    models = Models(ModelSettings(), prefix_hash_key="secret")
    await models.learn(model_card())
    models.serve("layout")
    hashes = models.hasher("layout").full_blocks(range(32))
    assert hashes == BlockHasher("ns", 16, hash_key("secret")).full_blocks(range(32))
    assert hashes != BlockHasher("ns", 16).full_blocks(range(32))
    assert hash_key("") == b""


async def test_settings_override_the_card(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json(300))
    models = Models(ModelSettings(tokenizer=str(tmp_path), served_model_name=("mine",)))
    await models.learn(model_card())
    models.serve("layout")
    assert models.current().names == ("mine",)
    assert models.current().card.files["tokenizer.json"] == byte_level_json(300)
    assert "tokenizer_config.json" not in models.current().card.files


async def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    models = Models(ModelSettings(tokenizer=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        await models.learn(model_card())
    assert not models.knows("layout")


async def test_a_tokenizers_name_means_what_it_means_to_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder is one, and a hub's tokenizer is of the revision that was asked for."""
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level_json(300))
    asked: list[str | None] = []

    def download(name: str, *, revision: str | None, **_: object) -> str:
        asked.append(revision)
        return str(folder)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("~/tok", "owner/tok"):
        models = Models(ModelSettings(tokenizer=name, revision="abc"))
        await models.learn(model_card())
        models.serve("layout")
        assert models.current().card.files["tokenizer.json"] == byte_level_json(300)
    assert asked == ["abc"]
