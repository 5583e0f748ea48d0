"""The same prompts, by this engine and by transformers' continuous batching on the same device."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator

import torch

from bench.gpu.engines import described, opened, settings
from bench.gpu.figures import Entry, Figure, Goal, Missing
from bench.gpu.lab import Lab


def measure(lab: Lab) -> Iterator[Entry]:
    sizes = lab.sizes
    case = f"{sizes.batch_size} prompts of {sizes.batch_prompt}, {sizes.batch_output} tokens each"
    with opened(settings(lab)) as engine:
        prompts = engine.prompts(sizes.batch_size, sizes.batch_prompt, seed=3)
        ours = 0.0
        for _ in range(2):  # the first time compiles and allocates
            began = time.perf_counter()
            for prompt in prompts:
                engine.ask(prompt, sizes.batch_output)
            engine.until_done()
            ours = time.perf_counter() - began
    if importlib.util.find_spec("transformers") is None:
        yield Missing(case, "transformers is not installed")
        return
    theirs = _transformers_s(lab, prompts)
    if isinstance(theirs, Missing):
        yield theirs
        return
    num_tokens = sizes.batch_size * sizes.batch_output
    of = f"its {num_tokens / theirs:,.1f} tokens/s"
    yield Figure(case, num_tokens / ours, "tokens/s", theirs / ours, of, Goal(1.0))


def _transformers_s(lab: Lab, prompts: list[tuple[int, ...]]) -> float | Missing:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(described(lab))
    with torch.device(lab.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    wish = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=lab.sizes.batch_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        results = model.generate_batch(inputs=[list(prompt) for prompt in prompts], generation_config=wish)
        lab.finish()
        seconds = time.perf_counter() - began
        lengths = [len(result.generated_tokens) for result in results.values()]
        if lengths != [lab.sizes.batch_output] * len(prompts):
            return Missing("against transformers", f"it generated {sum(lengths)} tokens", is_fault=True)
    return seconds
