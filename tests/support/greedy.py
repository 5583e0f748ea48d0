"""Greedy token ids of prompts of token ids: of one engine alone, and of a stack that serves the same checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openai

from tandem import LLM, SamplingParams


def alone(checkpoint: Path, prompts: Sequence[list[int]], num_output: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
    with LLM(str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


async def served(client: openai.AsyncOpenAI, prompt: list[int], num_output: int) -> list[int]:
    reply = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=num_output,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return list(reply.choices[0].token_ids)  # type: ignore[attr-defined]
