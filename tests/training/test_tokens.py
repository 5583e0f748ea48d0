"""Tokens of the built-in model: what is one, and which of them are to be learnt."""

from __future__ import annotations

from itertools import islice

import pytest
from tokenizers import Tokenizer

from training.batches import Plan, make_step
from training.corpus import samples
from training.sample import Sample, asked, assistant, user
from training.tokens import END, PLAIN_MARKS, SPECIAL_TOKENS, Renderer, encode, train_tokenizer

SIZE = 700


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    renderer = Renderer()
    return train_tokenizer([renderer(sample) for sample in islice(samples(1, longest_passage=5), 500)], SIZE)


def test_the_sizes_and_ids_are_as_promised(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert len(tokenizer.encode("".join(PLAIN_MARKS)).ids) == len(PLAIN_MARKS)


@pytest.mark.parametrize("text", ["Grüße, 你好 😀\n\t end", "a  b", "<tool_call>\n{}", "x=12,y"])
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_names_and_numbers_are_the_same_tokens_wherever_they_stand(tokenizer: Tokenizer) -> None:
    alone = tokenizer.encode("Zorva 472").ids
    for around in ("I am {}", '{{"name": "{}"}}', "({})"):
        ids = tokenizer.encode(around.format("Zorva 472")).ids
        assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))


def test_what_the_assistant_says_is_learnt_and_nothing_else(tokenizer: Tokenizer) -> None:
    talk = (user("Hello"), assistant("Hi"), user("Bye"), assistant("Goodbye!"))
    renderer = Renderer()
    sample = Sample(talk)
    (row,) = encode(tokenizer, [renderer(sample)], [sample])
    to_predict = [row.tokens[i + 1] for i in range(len(row.tokens) - 1) if row.learnt[i]]
    assert tokenizer.decode(to_predict, skip_special_tokens=False) == "Hi<|end|>Goodbye!<|end|>"


def test_the_template_shows_tools_and_calls() -> None:
    tool = {"type": "function", "function": {"name": "phone"}}
    text = Renderer()(Sample(asked("Call Ann.", "No.").messages, (tool,)))
    assert text == (
        '<|system|><tools>\n{"type": "function", "function": {"name": "phone"}}\n</tools><|end|>'
        "<|user|>Call Ann.<|end|><|assistant|>No.<|end|>"
    )
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "phone", "arguments": {"a": 1}}}],
    }
    talk = ({"role": "system", "content": "Be brief."}, user("Call."), call, {"role": "tool", "content": "done"})
    assert Renderer()(Sample(talk)) == (
        '<|system|>Be brief.<|end|><|user|>Call.<|end|><|assistant|><tool_call>\n{"name": "phone", "arguments": '
        '{"a": 1}}\n</tool_call><|end|><|tool|>done<|end|>'
    )


def test_a_step_is_a_function_of_plan_and_number(tokenizer: Tokenizer) -> None:
    plan = Plan(seed=5, rows=40, late_from=100, refined_from=(), context=2048)
    first, again = make_step(tokenizer, Renderer(), plan, 3), make_step(tokenizer, Renderer(), plan, 3)
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert any(a.tokens.shape != b.tokens.shape or (a.tokens != b.tokens).any()
               for a, b in zip(first, make_step(tokenizer, Renderer(), plan, 4), strict=False))  # fmt: skip


def test_batches_hold_every_row_once_and_positions_within_the_context(tokenizer: Tokenizer) -> None:
    plan = Plan(seed=5, rows=60, late_from=1, refined_from=(), context=2048)
    batches = make_step(tokenizer, Renderer(), plan, 3)
    assert sum(int((batch.tokens[:, 0] != END).sum()) for batch in batches) in range(55, 61)
    stretched = 0
    for batch in batches:
        rows, length = batch.tokens.shape
        used = batch.tokens != END
        assert int(batch.positions[used].max()) < plan.context
        assert bool((batch.positions.diff(dim=1) >= 1).all()), "positions grow"
        stretched += int((batch.positions.diff(dim=1) > 1).sum())
        counted = batch.weights > 0
        following = batch.tokens.flatten()[batch.where[counted] + 1]
        assert (following == batch.labels[counted]).all(), "labels are the next tokens"
        assert rows * length >= int(used.sum())
    assert stretched > 0
