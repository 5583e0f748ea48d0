"""``python -m training.evaluate``: held-out questions of every skill through a served stack, and how many were right.

An answer is right when it is the expected text, letter for letter: the working of a sum, each field of a JSON object
and each argument of a tool call included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import openai

from training.card import Part, write_card
from training.corpus import SKILLS
from training.guessing import share_guessed
from training.sample import Sample, Skill
from training.skills.codeword import CodeWord
from training.skills.honesty import outside

SEED = 7


@dataclass(frozen=True, slots=True)
class Score:
    """``prompt_tokens``: the mean. ``wrong``: samples with what was answered instead."""

    skill: str
    count: int
    prompt_tokens: float
    wrong: tuple[tuple[Sample, str], ...]

    @property
    def share(self) -> float:
        return 1 - len(self.wrong) / self.count


class LongCodeWord(CodeWord):
    """Only texts that fill most of the context."""

    name = "code word, long texts"

    def __init__(self) -> None:
        super().__init__(shortest=75)


def held_out(skill: Skill, count: int, seed: int = SEED) -> list[Sample]:
    """Instances that training never sees; for what is learnt by heart, some of those it does see."""
    random = Random(f"{seed} {skill.name}")
    return [skill.make(random, held_out=True) for _ in range(count)]


def questions(count: int) -> dict[str, list[Sample]]:
    """All that is asked, by its name in the table: ``count`` of each skill, and what was written by hand, each once."""
    skills: tuple[Skill, ...] = (*SKILLS, LongCodeWord())
    return {skill.name: held_out(skill, count) for skill in skills} | {"outside its skills": outside()[:count]}


async def answer(client: openai.AsyncOpenAI, model: str, sample: Sample) -> tuple[str, int]:
    """What the server says to the sample's question, and the tokens of the prompt."""
    request: dict[str, Any] = {"model": model, "messages": list(sample.messages[:-1]), "temperature": 0}
    if sample.tools:
        request |= {"tools": list(sample.tools), "tool_choice": "none"}
    reply = await client.chat.completions.create(**request)
    assert reply.usage is not None
    return reply.choices[0].message.content or "", reply.usage.prompt_tokens


async def score(client: openai.AsyncOpenAI, skill: str, samples: list[Sample], concurrency: int) -> Score:
    """``concurrency`` requests are on their way at a time."""
    model = (await client.models.list()).data[0].id
    turns = asyncio.Semaphore(concurrency)

    async def ask(sample: Sample) -> tuple[Sample, str, int]:
        async with turns:
            return sample, *await answer(client, model, sample)

    results = await asyncio.gather(*(ask(sample) for sample in samples))
    wrong = tuple((sample, said) for sample, said, _ in results if not sample.accepts(said))
    num_tokens = sum(tokens for _, _, tokens in results)
    return Score(skill, len(results), num_tokens / len(results), wrong)


async def evaluate(url: str, count: int, concurrency: int, show: int) -> list[Score]:
    """Scores every skill at ``url``; prints up to ``show`` wrong answers of each."""
    scores: list[Score] = []
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        for skill, samples in questions(count).items():
            scores.append(await score(client, skill, samples, concurrency))
            for sample, said in scores[-1].wrong[:show]:
                question = str(sample.messages[-2]["content"])
                print(f"{skill}: {question[-160:]!r}\n  wanted {sample.answer!r}\n  said   {said!r}", file=sys.stderr)
    return scores


def table(scores: Sequence[Score]) -> str:
    lines = ["| skill | right | questions | tokens of a prompt, mean |", "|---|---:|---:|---:|"]
    lines += [f"| {s.skill} | {s.share:.1%} | {s.count} | {s.prompt_tokens:.0f} |" for s in scores]
    return "\n".join(lines)


@contextmanager
def served(model: Path, prefill: int, decode: int) -> Iterator[str]:
    """A local stack with every tier, where each prompt goes through a prefill worker; its URL."""
    command = [sys.executable, "-m", "tandem", "serve", str(model), "--port=0", "--host=127.0.0.1"]
    command += [f"--prefill={prefill}", f"--decode={decode}", "--disagg-threshold=0", "--num-gpu-blocks-override=2048"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("Ready: "):
                raise SystemExit(f"tandem serve did not start: {line!r}")
            yield line.split()[1]
        finally:
            os.kill(process.pid, signal.SIGINT)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser("training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/builtin-model/out"))
    parser.add_argument("--url", help="a server that runs already, instead of one of our own with --model")
    parser.add_argument("--count", type=int, default=200, help="questions per skill")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--show", type=int, default=3, help="wrong answers to show per skill")
    parser.add_argument("--card", type=Path, help="write the model's README there; needs --work")
    parser.add_argument("--work", type=Path, default=Path(".cache/builtin-model"), help="where it was trained")
    given = parser.parse_args()
    if given.url:
        scores = asyncio.run(evaluate(given.url, given.count, given.concurrency, given.show))
    else:
        with served(given.model, given.prefill, given.decode) as url:
            scores = asyncio.run(evaluate(url, given.count, given.concurrency, given.show))
    print(table(scores))
    if given.card:
        samples = [sample for skill in SKILLS for sample in held_out(skill, given.count // 10)]
        model, draft = (
            Part.of(given.model / folder / "model.safetensors", given.work / f"{part}.json")
            for folder, part in (("", "model"), ("draft", "draft"))
        )
        guessed = share_guessed(given.model / "draft", samples)
        write_card(given.card, table(scores), model, draft, f"{os.cpu_count()} CPU cores", guessed, len(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
