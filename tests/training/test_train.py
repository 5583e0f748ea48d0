"""Training goes on after an interruption as if there had been none, and what is exported is what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from tandem import LLM, SamplingParams
from training.__main__ import claim
from training.batches import Plan
from training.corpus import samples
from training.export import export, load
from training.guessing import share_guessed
from training.model import Network, Shape, _angles, _Normed, _rotate
from training.priming import prime
from training.sample import Sample, asked
from training.tokens import Renderer, train_tokenizer
from training.train import Recipe, Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    renderer = Renderer()
    return train_tokenizer([renderer(sample) for sample in islice(samples(1, longest_passage=3), 300)], 400)


def trainer(tokenizer: Tokenizer, file: Path, steps: int = 4) -> Trainer:
    shape = Shape(400, hidden=32, inner=64, layers=2, heads=2, kv_heads=1, head_dim=16)
    recipe = Recipe(steps, (), Plan(seed=3, rows=6, late_from=100, refined_from=(), context=512))
    return Trainer(shape, recipe, tokenizer, file, CPU)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = trainer(tokenizer, tmp_path / "whole.pt")
    whole.run(print)
    parts = trainer(tokenizer, tmp_path / "parts.pt")
    start = {name: weight.clone() for name, weight in parts.network.state_dict().items()}
    parts.run(print, until=2)
    resumed = trainer(tokenizer, tmp_path / "parts.pt")
    assert resumed.step == 2
    resumed.run(print)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name])
        assert not torch.equal(weight, start[name])
    assert json.loads((tmp_path / "whole.json").read_text())["step"] == 4


def test_the_result_is_the_mean_of_the_last_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = Shape(400, hidden=32, inner=64, layers=2, heads=2, kv_heads=1, head_dim=16)
    plan = Plan(seed=3, rows=6, late_from=100, refined_from=(2, 3), context=512)
    recipe = Recipe(2, (1, 1), plan, num_averaged=2)
    file = tmp_path / "ends.pt"
    ends = []
    for step in (1, 2, 3, 4):  # taken up again each time: the ends are kept
        trained = Trainer(shape, recipe, tokenizer, file, CPU)
        trained.run(print, until=step)
        ends.append({name: weight.clone() for name, weight in trained.network.state_dict().items()})
        if step == 1:
            assert torch.equal(trained.result().state_dict()["embed_tokens.weight"], ends[0]["embed_tokens.weight"]), (
                "no end yet"
            )
    for name, weight in trained.result().state_dict().items():
        assert torch.allclose(weight, (ends[2][name] + ends[3][name]) / 2)
        assert not torch.equal(weight, ends[3][name])


def test_the_rate_warms_up_stays_and_falls_to_nothing() -> None:
    recipe = Recipe(
        1000, (200, 100), Plan(seed=3, rows=6, late_from=100, refined_from=(1000, 1200), context=512), cool_down=0.25
    )
    assert recipe.rate(0) < 0.05
    assert recipe.rate(100) == recipe.rate(749) == 1.0
    assert recipe.rate(875) == pytest.approx(0.5)
    assert recipe.rate(999) < 0.01
    assert 0.3 < recipe.rate(1040) <= 0.4, "a lower hill"
    assert recipe.rate(1199) < 0.01
    assert recipe.rate(1250) == pytest.approx(0.2)
    assert recipe.all_steps == 1300
    assert recipe.rate(1300) == 0.0


def test_the_norm_and_its_gradient_are_the_textbook_s() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 32, requires_grad=True)
    weight = torch.randn(5, 32)
    ours, theirs = _Normed.apply(x, 1e-6), functional.rms_norm(x, (32,), eps=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-6)
    (mine,), (other,) = (torch.autograd.grad((out * weight).sum(), x) for out in (ours, theirs))
    assert torch.allclose(mine, other, atol=1e-5)


def test_rotation_turns_pairs_of_halves() -> None:
    x, cos, sin = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 0.0), torch.full((4,), 1.0)
    assert _rotate(x, cos, sin).tolist() == [-3.0, -4.0, 1.0, 2.0]


@pytest.mark.parametrize("length", [40, 700])
def test_both_ways_of_attention_agree(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = Network(Shape(400, hidden=32, inner=64, layers=2, heads=4, kv_heads=2, head_dim=16))
    tokens, positions = torch.randint(0, 400, (2, length)), torch.arange(length).repeat(2, 1)
    with torch.no_grad():
        monkeypatch.setattr("training.model._FUSED_FROM", 0)
        fused = network(tokens, positions).float()
        monkeypatch.setattr("training.model._FUSED_FROM", 10_000)
        assert torch.allclose(network(tokens, positions).float(), fused, atol=0.15)


def test_the_engine_says_what_the_network_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(
        Shape(400, hidden=32, inner=64, layers=2, heads=4, kv_heads=2, head_dim=16, context=256), torch.float32
    )
    for parameter in network.parameters():
        parameter.data = (parameter.data * (3 if parameter.ndim == 2 else 1)).to(torch.bfloat16).float()
    export(network, tokenizer, tmp_path)
    prompt = tokenizer.encode("The old baker carried a lamp to the harbour and Zorvanek followed him there.").ids
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    with LLM(str(tmp_path), dtype="float32", threads=1, num_gpu_blocks_override=32) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    (shown,) = output.outputs[0].logprobs or ()
    with torch.no_grad():
        hidden = network(torch.tensor([prompt]), torch.arange(len(prompt))[None])[0, -1]
        expected = functional.linear(hidden, network.embed_tokens.weight).log_softmax(-1)
    for token, entry in shown.items():
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-3)


def test_a_primed_network_looks_one_two_and_three_tokens_back() -> None:
    torch.manual_seed(0)
    shape = Shape(400)
    network = Network(shape)
    prime(network)
    attention = network.layers[0].self_attn
    with torch.no_grad():
        x = network.layers[0].input_layernorm(network.embed_tokens(torch.randint(5, 400, (1, 60))))
        cos, sin = _angles(torch.arange(60)[None], shape)
        split = (1, 60, -1, shape.head_dim)
        queries = _rotate(attention.q_proj(x).view(split), cos, sin)[0, -1]
        keys = _rotate(attention.k_proj(x).view(split), cos, sin)[0, :, 0]
        for head in range(3):
            scores = keys @ queries[head] * shape.head_dim**-0.5
            assert int(scores.argmax()) == 59 - (head + 1)
            assert float(scores.softmax(0).max()) > 0.5


def test_what_is_exported_is_read_back_and_a_draft_guesses_what_it_has_learnt(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Network(Shape(400, hidden=32, inner=64, layers=2, heads=2, kv_heads=1, head_dim=16, context=512))
    export(network, tokenizer, tmp_path)
    again = load(tmp_path)
    assert again.shape == network.shape
    for name, weight in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(torch.bfloat16).float())
    # Every hidden state is the same, so it says one token for ever: the one its samples' answers consist of.
    for parameter in network.parameters():
        parameter.data.fill_(1.0)
    network.embed_tokens.weight.data[tokenizer.encode("a").ids[0]] = 2.0
    export(network, tokenizer, tmp_path)
    assert share_guessed(tmp_path, [Sample(asked("x", "aaa").messages)]) == 3 / 4, "all but the end"


def test_nothing_is_added_to_what_other_code_has_made(tmp_path: Path) -> None:
    assert claim(tmp_path, 10) == ""
    assert claim(tmp_path, 10) == ""
    assert "move it away" in claim(tmp_path, 11)
    (tmp_path / "made-by").write_text("another")
    assert "other code" in claim(tmp_path, 10)
    (tmp_path / "made-by").rename(tmp_path / "model.pt")
    assert "other code" in claim(tmp_path, 10)
