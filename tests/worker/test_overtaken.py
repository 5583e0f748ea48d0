"""Two messages on their way at once: the router's to a prefill worker, and a decode worker's about the same try.

Whichever comes first, blocks that the router still has plans for are there when its word arrives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proto.control import Abort, Attach, Prefill, Redirect, Rejected, RejectReason
from proto.ids import Generation
from proto.lifecycle import Stage
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import (
    FIRST,
    LEASE_S,
    Pod,
    Side,
    alone,
    make_request,
    num_finished,
    prompt_of,
    served,
    until_idle,
)

SECOND = Generation(2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("overtaken"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


def rejections(side: Side) -> list[tuple[RejectReason, bool]]:
    return [(each.reason, each.held) for each in side.router.of(Rejected)]


@pytest.mark.parametrize("when", ["before the offer", "streaming"])
async def test_an_abort_at_the_decode_worker_does_not_overtake_a_redirect(pod: Pod, when: str) -> None:
    """The router gives a decode worker up; what that says to the prefill worker is there before the redirect."""
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(300), temperature=0.8)
    if when == "before the offer":
        first.tier.handle(Abort(request.id, FIRST))
        p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
    else:
        first.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
        p.tier.handle(Prefill(request, FIRST, first.peer, LEASE_S))
        await p.router.until(lambda: Stage.STREAMING in p.router.stages())
        first.tier.handle(Abort(request.id, FIRST))
    await p.router.until(lambda: bool(rejections(p)))
    assert rejections(p) == [(RejectReason.STALE, True)], "its router, should it not know, hears that they are held"
    await p.router.until(lambda: Stage.SEALED in p.router.stages())
    second.tier.handle(Attach(request, SECOND, local=False, lease_s=LEASE_S))
    p.tier.handle(Redirect(request.id, SECOND, second.peer))
    await second.router.until(lambda: num_finished(second) == 1)
    assert served(p, second) == alone(pod, request)
    assert await p.host.call(lambda core: core.stats.prompt_tokens_computed) == 300
    assert await second.host.call(lambda core: core.stats.prompt_tokens_computed) == 0
    for side in (p, first, second):
        await side.tier.drained()
        await until_idle(side)
