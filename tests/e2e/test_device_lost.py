"""A decode worker whose device is lost during a copy ends, says why, and comes back; its requests finish elsewhere."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from tandem.supervisor import ChildSpec
from tests.support.checkpoints import make_checkpoint
from tests.support.greedy import alone, served
from tests.support.stack import running, stack_settings

ROOT = Path(__file__).parents[2]
NUM_OUTPUT = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("device"), "llama")


async def test_its_requests_have_the_tokens_they_would_have_had(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "lost"

    def wire(spec: ChildSpec) -> ChildSpec:
        if not spec.name.startswith("decode"):
            return spec
        argv = (sys.executable, "-m", "tests.support.losing_decode", str(marker))
        return replace(spec, argv=argv, environ={**spec.environ, "PYTHONPATH": str(ROOT)})

    rng = random.Random(3)
    prompts = [[rng.randrange(5, 300) for _ in range(length)] for length in (300, 40)]
    with running(stack_settings(checkpoint, decode=2), wire=wire) as stack:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            for prompt, expected in zip(prompts, alone(checkpoint, prompts, NUM_OUTPUT), strict=True):
                assert await served(client, prompt, NUM_OUTPUT) == expected
        assert marker.exists(), "no worker has lost its device"
        assert any("stopping after an error" in line for line in stack.lines), "it ends, and says why"
        stack.assert_nothing_leaks()
