"""The same prompts by transformers' continuous batching, in a process of its own: it ends when it is told to.

    python -m bench.gpu.transformers_peer FOLDER DEVICE NUM_TOKENS MAX_BATCH_TOKENS     prompts as JSON on stdin

FOLDER describes the model; its weights are random. Prints JSON: the seconds that the second of two equal runs took,
what computed attention, and how many tokens each prompt got.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

_USUAL_PAGE = 256


def main(argv: Sequence[str]) -> None:
    folder, device, num_tokens, max_batch_tokens = argv
    prompts: list[list[int]] = json.load(sys.stdin)
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    wish = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=int(num_tokens), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Left alone it takes most of the device's memory, and attention without flash sees a mask as wide as that.
    defaults = {field.name: field.default for field in dataclasses.fields(ContinuousBatchingConfig)}
    named = [defaults.get("page_size"), defaults.get("block_size")]
    page = next((size for size in named if isinstance(size, int)), _USUAL_PAGE)
    needed = sum(-(-(len(prompt) + int(num_tokens)) // page) + 1 for prompt in prompts)
    room = ContinuousBatchingConfig(num_blocks=needed, max_batch_tokens=int(max_batch_tokens))
    seconds, lengths = 0.0, [0]
    for _ in range(2):
        began = time.perf_counter()
        results = model.generate_batch(
            inputs=prompts, generation_config=wish, continuous_batching_config=room, persistent_manager=True
        )
        seconds = time.perf_counter() - began
        lengths = [len(result.generated_tokens) for result in results.values()]
    attention = str(model.config._attn_implementation)
    sys.stdout.write(json.dumps({"seconds": seconds, "attention": attention, "lengths": lengths}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
