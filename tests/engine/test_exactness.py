"""The whole engine (scheduler, paged KV, sampler) against `transformers`, token by token, greedy, float32.

The runner's own tests compare logits. Here the ways a request can be served are compared: alone, in mixed batches, in
small chunks, with prefix hits, and after preemption; the tokens must be those of a plain forward pass every time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.build import EngineParts, load_engine_parts
from engine.core import EngineCore
from proto.ids import RequestId
from proto.request import FinishReason, Request, SamplingParams
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tests.support.checkpoints import make_checkpoint

NUM_OUTPUT = 8
LENGTHS = (1, 15, 16, 17, 100, 700)
FAMILIES = {
    "llama": {},
    "llama3-rope": {
        "family": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}


class Oracle:
    """Greedy tokens by `transformers`, one forward pass per prompt and token, remembered."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], list[int]] = {}

    @torch.inference_mode()
    def greedy(self, prompt: tuple[int, ...]) -> list[int]:
        if prompt not in self._known:
            tokens: list[int] = []
            step, past = torch.tensor([prompt]), None
            while len(tokens) < NUM_OUTPUT:
                out = self._model(step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                step = torch.tensor([[tokens[-1]]])
            self._known[prompt] = tokens
        return self._known[prompt]


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    options = dict(FAMILIES[request.param])
    family = str(options.pop("family", request.param))
    directory = make_checkpoint(tmp_path_factory.mktemp(request.param), family, **options)
    return directory, Oracle(directory)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(f"{length}/{seed}")
    return tuple(rng.randrange(5, 300) for _ in range(length))


class Engine:
    """An engine with the given limits; ``greedy`` serves prompts together."""

    def __init__(self, directory: Path, *, num_blocks: int = 400, chunk: int = 2048, max_model_len: int = 1024) -> None:
        settings = EngineSettings(
            model=ModelSettings(
                model=str(directory), dtype="float32", device="cpu", threads=1, max_model_len=max_model_len
            ),
            cache=CacheSettings(num_gpu_blocks_override=num_blocks),
            scheduler=SchedulerSettings(max_num_batched_tokens=chunk, max_num_seqs=8),
        )
        self.parts: EngineParts = load_engine_parts(settings)
        self.core = EngineCore(self.parts.runner, self.parts.kv, self.parts.facts, self.parts.hasher)
        self._count = 0
        self.num_preempted = 0

    def greedy(self, *prompts: tuple[int, ...]) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True, seed=0)
        outputs: dict[RequestId, list[int]] = {}
        for prompt in prompts:
            self._count += 1
            request = Request(id=RequestId(f"t.{self._count}"), prompt=prompt, params=params)
            outputs[request.id] = []
            self.core.add(request)
        while self.core.has_work():
            step = self.core.step()
            self.num_preempted += len(step.preempted)
            for token in step.tokens:
                assert token.position == len(outputs[token.request])
                outputs[token.request].append(token.token)
                assert token.finish is (FinishReason.LENGTH if token.position == NUM_OUTPUT - 1 else None)
            self.core.check_integrity()
        assert self.core.is_idle()
        return list(outputs.values())

    def close(self) -> None:
        self.parts.kv.close()


@pytest.fixture
def engine_of(checkpoint: tuple[Path, Oracle]) -> Iterator[object]:
    engines: list[Engine] = []

    def make(**limits: int) -> Engine:
        engines.append(Engine(checkpoint[0], **limits))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("chunk", [32, 512])
def test_alone_in_chunks(checkpoint: tuple[Path, Oracle], engine_of: type[Engine], chunk: int) -> None:
    engine = engine_of(chunk=chunk)
    for length in LENGTHS:
        prompt = prompt_of(length)
        assert engine.greedy(prompt) == [checkpoint[1].greedy(prompt)], f"{length} tokens in chunks of {chunk}"


@pytest.mark.parametrize("chunk", [32, 512])
def test_in_mixed_batches_of_eight(checkpoint: tuple[Path, Oracle], engine_of: type[Engine], chunk: int) -> None:
    prompts = [prompt_of(length) for length in (*LENGTHS, 33, 64)]
    assert engine_of(chunk=chunk).greedy(*prompts) == [checkpoint[1].greedy(prompt) for prompt in prompts]


def test_with_prefix_hits(checkpoint: tuple[Path, Oracle], engine_of: type[Engine]) -> None:
    engine = engine_of()
    base = prompt_of(100)
    prompts = [base, base[:97], base[:64], base + prompt_of(30, seed=1), base[:50] + prompt_of(20, seed=2)]
    for prompt in prompts:
        assert engine.greedy(prompt) == [checkpoint[1].greedy(prompt)]
    assert engine.core.stats.cache_hit_tokens >= 96 + 48 + 96 + 48


def test_after_preemption(checkpoint: tuple[Path, Oracle], engine_of: type[Engine]) -> None:
    """Too few blocks for all: some requests are preempted and computed again, and nobody can tell."""
    prompts = [prompt_of(28 + index % 4, seed=index) for index in range(8)]
    tight = engine_of(num_blocks=8, max_model_len=128)
    assert tight.greedy(*prompts) == [checkpoint[1].greedy(prompt) for prompt in prompts]
    assert tight.num_preempted > 0
