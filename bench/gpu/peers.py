"""The same prompts, by this engine and by transformers' continuous batching on the same device."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.gpu.children import environment
from bench.gpu.engines import described, opened, settings
from bench.gpu.figures import Entry, Figure, Goal, Missing
from bench.gpu.lab import Lab

_LIMIT_S = 180.0


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
    num_tokens = sizes.batch_size * sizes.batch_output
    if importlib.util.find_spec("transformers") is None:
        yield Missing(case, "transformers is not installed")
        return
    theirs = _by_transformers(lab, prompts)
    if isinstance(theirs, str):
        yield Figure(case, num_tokens / ours, "tokens/s")
        yield Missing(f"{case}: transformers", theirs, is_fault=True)
        return
    seconds, attention = theirs
    of = f"its {num_tokens / seconds:,.1f} tokens/s ({attention})"
    yield Figure(case, num_tokens / ours, "tokens/s", seconds / ours, of, Goal(1.0))


def _by_transformers(lab: Lab, prompts: list[tuple[int, ...]]) -> tuple[float, str] | str:
    """Seconds, and what computed attention; or what went wrong."""
    sizes = lab.sizes
    arguments = (str(described(lab)), lab.device.type, str(sizes.batch_output), str(sizes.batch_tokens))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu.transformers_peer", *arguments],
            input=json.dumps(prompts),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it was not done within {_LIMIT_S:.0f} s"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    said = json.loads(lines[-1])
    if said["lengths"] != [sizes.batch_output] * len(prompts):
        return f"it generated {sum(said['lengths'])} tokens"
    return said["seconds"], said["attention"]
