"""One engine in this process, asked directly: no network, no text, nobody else's requests."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.checkpoint import write_description
from bench.gpu.lab import Lab, free_memory
from bench.gpu.sizes import BLOCK_SIZE
from engine.build import EngineParts, build_core, load_engine_parts
from engine.core import EngineCore
from engine.output import StepOutput
from proto.ids import RequestId
from proto.request import Request, SamplingParams, TokenOut
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings

_WARM_UP_STEPS = 3


def settings(lab: Lab, **model: object) -> EngineSettings:
    """Of an engine of the measured model, which uses Triton's kernels, for all the requests of these sizes.

    ``model``: fields of ``ModelSettings`` beside those.
    """
    sizes = lab.sizes
    num_tokens = _num_tokens_asked(max(sizes.steps), sizes.context, sizes.num_steps, sizes.batch_tokens)
    longest = max(
        sizes.prompt + sizes.compared,
        sizes.context + num_tokens,
        sizes.batch_prompt + sizes.batch_output,
    )
    length = -(-(longest + BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE
    rows = max(*sizes.steps, sizes.batch_size, sizes.among + 1)
    growth = num_tokens + 2 * BLOCK_SIZE
    captured = {1, *sizes.steps, sizes.quantised_batch, sizes.batch_size, sizes.among + 1}
    wish = ModelSettings(
        model=str(described(lab)),
        load_format="dummy",
        dtype="bfloat16",
        device=lab.device.type,
        attention_backend="triton",
        max_model_len=length,
        cuda_graph_sizes=tuple(map(str, sorted(captured))),
        seed=1,
    )
    blocks = max(
        max(sizes.steps) * (sizes.context + growth),
        (sizes.among + 1) * (sizes.batch_prompt + sizes.compared + growth) + sizes.batch_tokens,
        sizes.batch_size * (sizes.batch_prompt + sizes.batch_output + growth),
        2 * length,
    )
    return EngineSettings(
        model=replace(wish, **model),  # type: ignore[arg-type]
        cache=CacheSettings(
            block_size=BLOCK_SIZE, num_gpu_blocks_override=-(-blocks // BLOCK_SIZE), enable_prefix_caching=False
        ),
        scheduler=SchedulerSettings(max_num_seqs=rows, max_num_batched_tokens=sizes.batch_tokens),
    )


def described(lab: Lab) -> Path:
    """The measured model's folder: everything but weights."""
    folder = lab.scratch / "model"
    if not folder.exists():
        write_description(folder, lab.sizes.model, lab.sizes.vocab_size)
    return folder


@contextmanager
def opened(wish: EngineSettings) -> Iterator[Engine]:
    engine = _open(wish)
    try:
        yield engine
    finally:
        engine.parts.kv.close()
        vars(engine).clear()  # whoever still has a name for it must not keep its memory
        free_memory()


def _open(wish: EngineSettings) -> Engine:
    parts = load_engine_parts(wish)
    return Engine(build_core(parts, wish), parts)


@dataclass
class Engine:
    core: EngineCore
    parts: EngineParts
    _num_requests: int = field(default=0, init=False)

    def prompts(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        random_ = random.Random(seed)
        vocab = self.parts.facts.vocab_size
        return [tuple(random_.randrange(10, vocab) for _ in range(length)) for _ in range(count)]

    def ask(
        self, prompt: tuple[int, ...], num_tokens: int, *, logprobs: int | None = None, forced: tuple[int, ...] = ()
    ) -> RequestId:
        """Greedily, to the given length."""
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, seed=0, logprobs=logprobs)
        name = RequestId(f"bench-{self._num_requests}")
        self.core.add(Request(id=name, prompt=prompt, params=params.checked(), forced=(forced,) if forced else ()))
        return name

    def until_done(self) -> list[StepOutput]:
        outputs = []
        while self.core.has_work():
            outputs.append(self.core.step())
        return outputs

    def answers(self, requests: Sequence[RequestId]) -> list[list[TokenOut]]:
        """What each of ``requests`` generates, to the end of all."""
        found: dict[RequestId, list[TokenOut]] = {request: [] for request in requests}
        for output in self.until_done():
            for token in output.tokens:
                if token.request in found:
                    found[token.request].append(token)
        return [found[request] for request in requests]

    def decode_step_s(self, num_rows: int, context: int, num_steps: int) -> float:
        """The median time of a step of ``num_rows`` that decode behind ``context`` tokens and a few more."""
        num_tokens = _num_tokens_asked(num_rows, context, num_steps, self.parts.facts.max_num_batched_tokens)
        for prompt in self.prompts(num_rows, context, seed=num_rows):
            self.ask(prompt, num_tokens)
        times: list[float] = []
        began = time.perf_counter()
        while self.core.has_work():
            output = self.core.step()
            ended = time.perf_counter()
            if len(output.tokens) == output.num_tokens == num_rows:
                times.append(ended - began)
            began = ended
        return statistics.median(times[_WARM_UP_STEPS:])

    def prefill_s(self, num_tokens: int, repeats: int) -> float:
        """The median time from a prompt to its first token, alone."""
        times = []
        for number, prompt in enumerate(self.prompts(repeats + 1, num_tokens, seed=num_tokens)):
            began = time.perf_counter()
            self.ask(prompt, 1)
            self.until_done()
            if number > 0:
                times.append(time.perf_counter() - began)
        return statistics.median(times)


def _num_tokens_asked(num_rows: int, context: int, num_steps: int, batch_tokens: int) -> int:
    """Tokens for each row, so that all decode together for ``num_steps`` steps: the first one in goes on until the last
    prompt has been read."""
    return num_steps + _WARM_UP_STEPS + 2 + -(-num_rows * context // (batch_tokens - num_rows))
