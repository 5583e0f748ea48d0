"""The model that comes along: what is promised of its files, and that an answer depends on every block it should."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from proto.settings import EngineSettings, ModelSettings
from tandem import LLM, SamplingParams
from tandem.builtin_model import DRAFT_FOLDER, FOLDER, NAME, with_some_model
from training.evaluate import LongCodeWord
from training.skills.facts import CAPITALS, capital

GREEDY = SamplingParams(temperature=0, max_tokens=64)


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(threads=1, num_gpu_blocks_override=256)


def test_it_is_small_and_its_draft_a_sixth_of_it() -> None:
    assert num_bytes(FOLDER) + num_bytes(DRAFT_FOLDER) <= 12_000_000
    weights, draft = ((folder / "model.safetensors").stat().st_size for folder in (FOLDER, DRAFT_FOLDER))
    assert draft * 6 <= weights


@pytest.mark.parametrize("folder", [FOLDER, DRAFT_FOLDER], ids=["model", "draft"])
def test_it_is_in_hugging_face_s_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 2048
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a mapping


def test_the_draft_has_the_same_tokens_and_template() -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (FOLDER / name).read_bytes() == (DRAFT_FOLDER / name).read_bytes()


def test_any_text_is_tokens_and_comes_back() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = "Grüße, 你好 😀\n\t\x00 end"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_it_and_says_the_same(llm: LLM) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for country in list(CAPITALS)[:5]:
        messages = list(capital(country).messages[:-1])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = torch.tensor([prompt["input_ids"]])
        out = model.generate(ids, do_sample=False, temperature=None, max_new_tokens=32)[0, ids.shape[1] :]
        (ours,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert tokenizer.decode(out, skip_special_tokens=True) == ours.outputs[0].text == capital(country).answer


def test_it_serves_where_no_model_is_named() -> None:
    wanted = with_some_model(EngineSettings())
    assert (wanted.model.model, wanted.model.served_model_name) == (str(FOLDER), (NAME,))
    named = EngineSettings(model=ModelSettings(model="/other"))
    assert with_some_model(named) is named


def test_its_answers_end_by_themselves_and_are_greedy_unless_asked_otherwise(llm: LLM) -> None:
    first, again = (llm.chat(list(capital("Peru").messages[:-1]), use_tqdm=False)[0] for _ in range(2))
    assert first.outputs[0].text == again.outputs[0].text == capital("Peru").answer
    assert first.outputs[0].finish_reason == "stop"


def test_the_block_that_holds_the_code_word_decides_the_answer() -> None:
    """With the cached keys and values around the word zeroed the answer is wrong; elsewhere, it stays."""
    sample = LongCodeWord().make(Random(5), held_out=True, depth=0.5)
    messages, word = list(sample.messages[:-1]), sample.answer.removeprefix("The code word is ").removesuffix(".")
    with LLM(threads=1, num_gpu_blocks_override=256) as llm:
        (right,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert sample.accepts(right.outputs[0].text)
        tokenizer = llm.get_tokenizer()
        before, _, _ = tokenizer.decode(right.prompt_token_ids).partition(word)
        place = len(tokenizer.encode(before)) // 16
        memory = damaged(llm, range(place // 2, place // 2 + 2))
        (elsewhere,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert elsewhere.num_cached_tokens > 0
        assert sample.accepts(elsewhere.outputs[0].text), "a sentence that nobody asked about"
        memory[place : place + 2] = 0
        (wrong,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert not sample.accepts(wrong.outputs[0].text)


def damaged(llm: LLM, blocks: range) -> torch.Tensor:
    """The KV memory, after zeroing ``blocks``. A fresh engine's first prompt lies in its first blocks, in order."""
    assert llm._parts is not None
    memory = llm._parts.kv.paged.data
    memory[blocks.start : blocks.stop] = 0
    return memory
