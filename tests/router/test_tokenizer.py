"""A served model encodes as transformers does, and knows its tokens' bytes and its defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from proto.errors import CheckpointError, InvalidRequest, SettingsError
from router.tokenizer import ServedModel
from tests.support.http import byte_fallback_json, byte_level_json, model_card, served_model

BASE = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
CONFIGS = {
    "plain": BASE,
    "adds bos": {**BASE, "add_bos_token": True},
    "adds both": {**BASE, "add_bos_token": True, "add_eos_token": True},
    "adds none": {**BASE, "add_bos_token": False},
    "dict tokens": {"bos_token": {"content": "<|begin|>", "__type": "AddedToken"}, "eos_token": "<|end|>"},
    "extra": {**BASE, "extra_special_tokens": ["<|tool|>", "<|user|>"]},
    "new pad": {**BASE, "pad_token": "<|pad|>"},
    "declared": {
        **BASE,
        "added_tokens_decoder": {
            "410": {"content": "<|later|>", "special": True, "normalized": False},
            "400": {"content": "<think>", "special": False, "normalized": False},
        },
    },
}
TEXTS = ["Hello world", "", " two  spaces ", "<|user|>hi<|end|>", "你好 😀 <|tool|><|pad|> <think>x</think>", "a\nb\t"]


def files_of(config: dict, *, adds_bos: bool = False) -> dict[str, bytes]:
    return {
        "tokenizer.json": byte_level_json(adds_bos=adds_bos),
        "tokenizer_config.json": json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}).encode(),
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adds_bos", [False, True], ids=["no-processor", "bos-processor"])
def test_same_ids_and_text_as_transformers(tmp_path: Path, name: str, adds_bos: bool) -> None:
    files = files_of(CONFIGS[name], adds_bos=adds_bos)
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    reference, model = AutoTokenizer.from_pretrained(tmp_path), served_model(files)
    for text in TEXTS:
        for special in (True, False):
            ids = model.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert model.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_truncation_and_padding_of_the_file_are_off() -> None:
    raw = json.loads(byte_level_json())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin|>",
    }  # fmt: skip
    model = served_model({"tokenizer.json": json.dumps(raw).encode()})
    assert (
        model.decode(model.encode("Hello world, how are you"), skip_special_tokens=False) == "Hello world, how are you"
    )


def test_invalid_unicode_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        served_model().encode("x \ud800")


def test_token_text_reads_as_inside_a_sentence() -> None:
    model = served_model({"tokenizer.json": byte_fallback_json()})
    world = Tokenizer.from_buffer(byte_fallback_json()).token_to_id("▁world")
    assert model.decode([world]) == "world"
    assert model.token_text(world) == " world"


@pytest.mark.parametrize("data", [byte_level_json(), byte_fallback_json()], ids=["byte-level", "byte-fallback"])
def test_token_bytes_join_to_the_text(data: bytes) -> None:
    model = served_model({"tokenizer.json": data})
    text = "Hello é 😀你 world"
    joined = b"".join(model.token_bytes(token) for token in model.encode(text, add_special_tokens=False))
    assert joined.decode().strip() == text


def test_special_tokens_have_a_text_of_their_own() -> None:
    model = served_model()
    assert model.token_text(1) == "<|end|>"
    assert model.token_bytes(1) == b"<|end|>"


def test_detokenizer_hides_special_tokens_on_request() -> None:
    model = served_model()
    for skip, expected in ((True, "hi"), (False, "hi<|end|>")):
        stream = model.detokenizer(skip_special_tokens=skip)
        assert "".join(stream.push(token) for token in [*model.encode("hi"), 1]) == expected


# Sampling defaults.

GENERATION = json.dumps(
    {"temperature": 0.6, "top_k": 20, "max_new_tokens": 9, "do_sample": True, "top_p": None}
).encode()


def test_defaults_come_from_the_models_generation_config() -> None:
    assert served_model({"generation_config.json": GENERATION}).defaults == {"temperature": 0.6, "top_k": 20}


def test_defaults_can_be_overridden_or_left_out(tmp_path: Path) -> None:
    card = model_card({"generation_config.json": GENERATION})
    assert ServedModel.from_card(card, generation_config="vllm").defaults == {}
    changed = ServedModel.from_card(card, override_generation_config={"temperature": 0.1})
    assert changed.defaults == {"temperature": 0.1, "top_k": 20}
    (tmp_path / "generation_config.json").write_text('{"min_p": 0.05}')
    assert ServedModel.from_card(card, generation_config=str(tmp_path)).defaults == {"min_p": 0.05}


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="temprature"):
        ServedModel.from_card(model_card(), override_generation_config={"temprature": 0.1})
    with pytest.raises(SettingsError, match="--generation-config"):
        ServedModel.from_card(model_card(), generation_config=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="--chat-template"):
        ServedModel.from_card(model_card(), chat_template=str(tmp_path / "none.jinja"))


BAD_KEY = b'{"added_tokens_decoder": {"x": {"content": "y"}}}'


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"nonsense"),
        ("tokenizer_config.json", BAD_KEY),
        ("generation_config.json", b"[]"),
    ],
)
def test_broken_files_are_named(file: str, data: bytes) -> None:
    with pytest.raises(CheckpointError, match=file):
        served_model({file: data})


def test_a_model_without_tokenizer_json_says_what_to_do() -> None:
    card = model_card()
    del card.files["tokenizer.json"]
    with pytest.raises(CheckpointError, match="save_pretrained"):
        ServedModel.from_card(card)


# Where templates come from.


def test_template_sources_in_their_order(tmp_path: Path) -> None:
    embedded = {"tokenizer_config.json": json.dumps({"chat_template": "embedded"}).encode()}
    message = [{"role": "user", "content": "x"}]
    assert served_model(embedded, template=None).templates.render(message) == "embedded"
    assert served_model(embedded, template="file").templates.render(message) == "file"
    override = tmp_path / "mine.jinja"
    override.write_text("mine")
    assert ServedModel.from_card(model_card(embedded), chat_template=str(override)).templates.render(message) == "mine"


def test_named_templates_of_the_configuration() -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    model = served_model({"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}, template=None)
    message = [{"role": "user", "content": "x"}]
    assert model.templates.render(message) == "D"
    assert model.templates.render(message, tools=[{"type": "function"}]) == "T"


def test_names_fall_back_to_the_model() -> None:
    model = served_model()
    assert (model.name, model.names) == ("tiny", ("tiny", "org/tiny-alias"))
    assert (model.max_model_len, model.vocab_size) == (256, 420)
