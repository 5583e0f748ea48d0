"""The stand-in model: the same bytes everywhere, one token per byte, and legible noise."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from tandem import sample_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_model.sample_model(tmp_path_factory.mktemp("cache"))


def test_it_is_written_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert sample_model.sample_model(folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no drafts are left behind"


def test_two_writers_make_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    made = [threading.Thread(target=sample_model.sample_model, args=(tmp_path,)) for _ in range(3)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    (again,) = tmp_path.iterdir()

    def digests(where: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in where.iterdir()}

    assert digests(again) == digests(folder)


def test_its_weights_have_the_shapes_its_config_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
        assert {tensor.get_dtype() for tensor in tensors.values()} == {"BF16"}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (vocab, hidden)
    assert shapes["model.layers.3.mlp.down_proj.weight"] == (hidden, config["intermediate_size"])
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (
        config["num_key_value_heads"] * config["head_dim"],
        hidden,
    )
    assert len(shapes) == 3 + 9 * config["num_hidden_layers"]


def test_every_byte_is_one_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Grüße, 你好 😀\n\t\x00 end"
    ids = tokenizer.encode(text).ids
    assert ids == [5 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|user|>hi<|end|>").ids == [3, 5 + ord("h"), 5 + ord("i"), 1]


def test_it_is_what_transformers_reads_and_its_noise_is_legible(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello there"}], add_generation_prompt=True)
    ids = torch.tensor([prompt["input_ids"]])
    torch.manual_seed(0)
    out = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=64)[0, ids.shape[1] :].tolist()
    assert len(out) == 64, "it does not stop by itself"
    text = bytes(token - 5 for token in out).decode("ascii")
    assert text.isprintable()
    assert len(set(text)) > 10, "the next byte depends on the context"


def test_the_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    assert sample_model.cache_folder({"TANDEM_CACHE": str(tmp_path)}) == tmp_path
    assert sample_model.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "tandem"
    assert sample_model.cache_folder({}).parts[-2:] == (".cache", "tandem")
