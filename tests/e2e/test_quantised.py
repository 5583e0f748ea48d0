"""A quantised model served by a prefill and a decode worker: handed-over KV gives the tokens of one engine alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from tandem import LLM, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.quantised import quantise
from tests.support.stack import Stack, running, stack_settings

PROMPT = "A question that is long enough for its keys and values to travel from one worker to the other. " * 5
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["gptq-desc-act", "plain, fp8 at load"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    """A folder, and what --quantization says."""
    plain = make_checkpoint(tmp_path_factory.mktemp("plain"))
    if request.param.startswith("plain"):
        return plain, "fp8"
    quantised, _ = quantise(plain, tmp_path_factory.mktemp("formats"), request.param)
    return quantised, None


@pytest.fixture(scope="module")
def stack(model: tuple[Path, str | None]) -> Iterator[Stack]:
    folder, quantization = model
    settings = stack_settings(folder)
    engine = replace(settings.engine, model=replace(settings.engine.model, quantization=quantization))
    with running(replace(settings, engine=engine)) as stack:
        yield stack


def test_a_handed_over_prompt_gives_the_tokens_of_one_engine_alone(
    stack: Stack, model: tuple[Path, str | None]
) -> None:
    folder, quantization = model
    with openai.OpenAI(base_url=stack.base_url, api_key="none") as client:
        reply = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=16,
            temperature=0.0,
            extra_headers={"X-Tandem-Timings": "1"},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    timings = (reply.model_extra or {})["timings"]
    assert timings["kv_bytes_moved"] > 0
    assert (timings["prefill_workers"], timings["decode_workers"]) == (["prefill-0"], ["decode-0"])
    options = {"dtype": "float32", "threads": 1, "num_gpu_blocks_override": 64, "device": "cpu"}
    with LLM(str(folder), quantization=quantization, **options) as llm:
        [output] = llm.generate(PROMPT, GREEDY)
    with LLM(str(make_checkpoint(folder)), **options) as llm:
        [plain] = llm.generate(PROMPT, GREEDY)
    [choice] = reply.choices
    assert (choice.model_extra or {})["token_ids"] == output.outputs[0].token_ids != plain.outputs[0].token_ids
    stack.assert_nothing_leaks()
