"""Offline generation, with a tiny checkpoint: shapes of the results, seeds, stops, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proto.errors import InvalidRequest, SettingsError
from tandem import LLM, RequestOutput, SamplingParams
from tests.support.checkpoints import make_checkpoint

SMALL = {"num_gpu_blocks_override": 64, "threads": 1, "skip_warmup": True, "device": "cpu"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), generation_config={"temperature": 0.5, "top_k": 7})


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SMALL) as made:
        yield made


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for output in outputs for choice in output.outputs]


def test_outputs_are_in_the_prompts_order_and_complete(llm: LLM) -> None:
    prompts = ["The quick brown fox", "Once upon a time", "Numbers:"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        (choice,) = output.outputs
        assert output.finished
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt or "")
        assert len(choice.token_ids) == 8
        assert (choice.index, choice.finish_reason, choice.stop_reason) == (0, "length", None)
        assert (choice.logprobs, choice.cumulative_logprob) == (None, None)
        assert choice.text == llm.get_tokenizer().decode(choice.token_ids)
    assert len({output.request_id for output in outputs}) == 3


def test_greedy_tokens_are_what_transformers_computes(llm: LLM, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for output in llm.generate(["The quick brown fox jumps", "Grüße"], GREEDY):
        ids = torch.tensor([output.prompt_token_ids])
        for token in output.outputs[0].token_ids:
            assert token == int(model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize(
    "prompt", ["Once upon", {"prompt": "Once upon"}, {"prompt_token_ids": [7, 8, 9]}, [7, 8, 9]], ids=str
)
def test_one_prompt_in_each_form(llm: LLM, prompt: str | dict[str, object] | list[int]) -> None:
    (output,) = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    is_text = "Once" in str(prompt)
    assert output.prompt == ("Once upon" if is_text else None)
    assert output.prompt_token_ids == (llm.get_tokenizer().encode("Once upon") if is_text else [7, 8, 9])


def test_text_and_its_ids_give_the_same_tokens(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("The quick brown fox")
    assert tokens_of(llm.generate([ids, ids], GREEDY)) == tokens_of(llm.generate(["The quick brown fox"] * 2, GREEDY))


def test_a_seed_decides_the_tokens_whatever_runs_beside(llm: LLM) -> None:
    params = SamplingParams(seed=11, max_tokens=12, ignore_eos=True)
    alone = tokens_of(llm.generate("Once upon", params))
    crowded = llm.generate(["Numbers: 1 2 3", "Once upon", "Punctuation"], params)
    assert [crowded[1].outputs[0].token_ids] == alone
    assert tokens_of(llm.generate("Once upon", replace(params, seed=12))) != alone


def test_requests_without_a_seed_repeat_with_the_models_seed(folder: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def drawn(seed: int) -> list[list[int]]:
        with LLM(str(folder), seed=seed, **SMALL) as llm:
            return tokens_of(llm.generate(["Once", "Once"], params)) + tokens_of(llm.generate("Once", params))

    first = drawn(3)
    assert drawn(3) == first
    assert drawn(4) != first
    assert first[0] != first[1], "two requests for the same prompt draw differently"


def test_choices_come_from_one_prompt_and_differ(llm: LLM) -> None:
    (output,) = llm.generate("Once upon a time", SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True))
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3


def test_a_stop_string_ends_a_choice_and_is_cut_off(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=40, ignore_eos=True)
    whole = llm.generate("Once upon", params)[0].outputs[0].text
    stop = whole[8:10]
    (choice,) = llm.generate("Once upon", replace(params, stop=[stop]))[0].outputs
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert len(choice.token_ids) < 40
    (kept,) = llm.generate("Once upon", replace(params, stop=stop, include_stop_str_in_output=True))[0].outputs
    assert kept.text == choice.text + stop


def test_a_stop_token_ends_a_choice_and_is_named(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=40, ignore_eos=True)
    tokens = llm.generate("Once upon", params)[0].outputs[0].token_ids
    (choice,) = llm.generate("Once upon", replace(params, stop_token_ids=[tokens[5]]))[0].outputs
    end = tokens.index(tokens[5]) + 1
    assert choice.token_ids == tokens[:end]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", tokens[5])


def test_logprobs_rank_the_candidates(llm: LLM) -> None:
    (choice,) = llm.generate("Once upon", replace(GREEDY, logprobs=3))[0].outputs
    assert choice.logprobs is not None
    assert len(choice.logprobs) == len(choice.token_ids)
    for token, candidates in zip(choice.token_ids, choice.logprobs, strict=True):
        assert next(iter(candidates)) == token
        assert [candidate.rank for candidate in candidates.values()] == [1, 2, 3]
        values = [candidate.logprob for candidate in candidates.values()]
        assert values == sorted(values, reverse=True)
        assert candidates[token].decoded_token == llm.get_tokenizer().token_text(token)
    chosen = [entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)]
    assert choice.cumulative_logprob is not None
    assert math.isclose(choice.cumulative_logprob, sum(chosen))


def test_parameters_per_prompt(llm: LLM) -> None:
    short, long = llm.generate(["Once", "Once"], [replace(GREEDY, max_tokens=2), GREEDY])
    assert long.outputs[0].token_ids[:2] == short.outputs[0].token_ids
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        llm.generate(["Once", "Once"], [GREEDY])


def test_the_models_own_sampling_defaults(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k) == (0.5, 7)
    assert llm.generate("Once")[0].outputs[0].finish_reason in ("length", "stop")


def test_chat_renders_the_template(llm: LLM) -> None:
    said = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(said, GREEDY)  # type: ignore[arg-type]
    assert output.prompt == "<|user|>Hello<|end|><|assistant|>"
    both = llm.chat([said, [*said, {"role": "assistant", "content": "Hi"}]], GREEDY)  # type: ignore[list-item]
    assert both[0].outputs == output.outputs
    assert len(both) == 2


def test_chat_reads_messages_as_the_server_does(llm: LLM) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], GREEDY, False)  # type: ignore[list-item]
    assert output.prompt == "<|user|>Hello\nyou<|end|><|assistant|>"
    with pytest.raises(InvalidRequest, match="takes text only"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY)
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.role"):
        llm.chat([{"content": "Hello"}], GREEDY)


def test_chat_takes_a_template_and_goes_on_with_an_answer(llm: LLM) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well"}]
    (output,) = llm.chat(said, GREEDY, chat_template="{{ bos_token }}{{ messages[0].content }}")  # type: ignore[arg-type]
    assert output.prompt == "<|begin|>Hello"
    (output,) = llm.chat(said, GREEDY, continue_final_message=True)  # type: ignore[arg-type]
    assert output.prompt == "<|user|>Hello<|end|><|assistant|>Well"
    with pytest.raises(InvalidRequest, match="template is broken"):
        llm.chat(said, GREEDY, chat_template="{% if %}")  # type: ignore[arg-type]


def test_priorities_are_one_per_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], GREEDY, priority=[1, 0])
    assert [output.prompt for output in outputs] == ["a", "b"]
    assert all(choice.finished() for output in outputs for choice in output.outputs)
    with pytest.raises(InvalidRequest, match="1 priorities for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=[1])


def test_served_as_they_come_prompts_have_no_priorities(folder: Path) -> None:
    with LLM(str(folder), scheduling_policy="fcfs", **SMALL) as plain:
        with pytest.raises(InvalidRequest, match="must be 0"):
            plain.generate(["a", "b"], GREEDY, priority=[1, 0])
        assert len(plain.generate(["a", "b"], GREEDY, priority=[0, 0])) == 2


def test_a_repeated_prompt_is_served_from_the_cache(llm: LLM) -> None:
    prompt = list(range(10, 80))
    assert llm.generate([prompt], GREEDY)[0].num_cached_tokens == 0
    again = llm.generate([prompt], GREEDY)[0]
    assert again.num_cached_tokens == 64
    assert tokens_of([again]) == tokens_of(llm.generate([prompt], GREEDY))


def test_a_bad_prompt_refuses_the_whole_call_and_leaves_the_engine_usable(llm: LLM) -> None:
    for bad, message in (
        ([], "empty"),
        ("", "empty"),
        ({"prompt_token_ids": [10**9]}, "vocabulary"),
        ({"promt": "x"}, "has no 'promt'"),
        (list(range(5, 100)) * 50, "context"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            llm.generate(["Once upon", bad], GREEDY)  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("Once", SamplingParams(temperature=9.0))
    assert len(llm.generate("Once upon", GREEDY)) == 1


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_unknown_settings_are_errors(folder: Path) -> None:
    with pytest.raises(SettingsError, match="Did you mean max_model_len"):
        LLM(str(folder), max_modle_len=3)
    with pytest.raises(SettingsError, match="tensor-parallel-size 2 is not supported"):
        LLM(str(folder), tensor_parallel_size=2)


def test_a_closed_llm_says_so(folder: Path) -> None:
    llm = LLM(str(folder), **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(InvalidRequest, match="closed"):
        llm.generate("Once", GREEDY)


def test_without_a_model_the_built_in_one_answers() -> None:
    with LLM(**SMALL) as llm:
        (output,) = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0, max_tokens=20))
    assert llm.get_tokenizer().name == "tandem-builtin"
    assert output.outputs[0].text == "Hello! How can I help you?"
