"""Transfers run beside the steps, but behind what they rely on: each side fences what it names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.core import EngineCore
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import Pod, make_request, num_finished, prompt_of, send


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[Pod]:
    pod = Pod(make_checkpoint(tmp_path / "model", "qwen3"))
    yield pod
    await pod.close()


async def test_each_side_fences_what_it_names(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    p, d = await pod.prefill(), await pod.decode()
    told: list[str] = []
    reserve, p_stepped = EngineCore.reserve, p.tier.stepped
    monkeypatch.setattr(p.host.parts.kv, "fence", lambda: told.append("fence of p"))
    monkeypatch.setattr(d.host.parts.kv, "fence", lambda: told.append("fence of d"))
    monkeypatch.setattr(EngineCore, "reserve", lambda *given: (told.append("reserved"), reserve(*given))[1])
    monkeypatch.setattr(
        p.tier, "stepped", lambda news: (told.append("filled") if news.output.filled else None, p_stepped(news))
    )
    send(p, d, make_request(1, prompt_of(150)))
    await d.router.until(lambda: num_finished(d) == 1)
    assert told.count("filled") == told.count("fence of p") == 3, "one per chunk of the prompt"
    for behind, before in (("filled", "fence of p"), ("fence of d", "reserved")):
        assert told.index(before) < told.index(behind)
    assert told.count("fence of d") == 1, "decode steps need none"
