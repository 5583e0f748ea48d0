"""A hand-off of fp8 blocks: their scales travel inside them, so nothing but the layout knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from proto.control import Abort, Rejected, RejectReason
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import FIRST, Pod, alone, make_request, num_finished, prompt_of, send, served, until_idle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fp8"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint, kv="fp8")
    yield pod
    await pod.close()


@pytest.mark.parametrize("length", [1, 16, 17, 200])
async def test_tokens_are_those_of_one_engine(pod: Pod, length: int) -> None:
    """Prompts that end in a block or with it; the long one comes in chunks, and each a second time from the cache."""
    p, d = await pod.prefill(), await pod.decode()
    for number in (1, 2):
        for side in (p, d):
            side.router.received.clear()
        request = make_request(number, prompt_of(length), temperature=0.8, n=2, max_tokens=20)
        send(p, d, request)
        await d.router.until(lambda: num_finished(d) == 2)
        assert served(p, d) == alone(pod, request)
    await until_idle(p)
    await until_idle(d)


async def test_blocks_take_little_more_than_half_of_bfloat16s(pod: Pod) -> None:
    layout = (await pod.prefill()).host.parts.facts.layout
    assert layout.dtype == "float8_e4m3fn"
    assert layout.block_bytes == 2 * 2 * 16 * 2 * (16 + 4)


async def test_a_peer_of_another_type_is_refused_before_any_block_travels(pod: Pod) -> None:
    d = await pod.decode()
    pod.settings = replace(pod.settings, cache=replace(pod.settings.cache, kv_cache_dtype="auto"))
    p = await pod.prefill()
    request = make_request(1, prompt_of(40))
    send(p, d, request)
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    [rejected] = p.router.of(Rejected)
    assert rejected.reason is RejectReason.MISMATCH
    assert "float8_e4m3fn" in rejected.message
    assert "float32" in rejected.message
    assert rejected.held
    assert 'tandem_handoffs_refused_total{reason="mismatch",role="prefill"} 1.0' in p.page()
    assert not d.router.tokens()
    for side in (p, d):
        side.tier.handle(Abort(request.id, FIRST))
        await until_idle(side)
