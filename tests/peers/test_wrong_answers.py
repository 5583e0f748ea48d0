"""How peers answered with another prompt's KV and status 200, replayed: each ends in the right tokens or in none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.transports.memory import Fault
from proto.control import Abort, Attach, Prefill, Rejected, RejectReason
from proto.handoff import Frame, HandoffMessage
from proto.ids import RequestId
from proto.lifecycle import Stage
from tests.support.checkpoints import make_checkpoint
from tests.support.tiers import (
    FIRST,
    LEASE_S,
    Pod,
    alone,
    make_request,
    num_finished,
    prompt_of,
    send,
    served,
    until_idle,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wrong"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


class SwapPayloads:
    """Frames carry the bytes, and the checksum, that another request's frame of the same index had."""

    def __init__(self) -> None:
        self._first: dict[int, Frame] = {}
        self.num_swapped = 0

    def __call__(self, message: HandoffMessage) -> Sequence[HandoffMessage]:
        if not isinstance(message, Frame):
            return (message,)
        other = self._first.setdefault(message.index, replace(message, payload=bytes(message.payload)))  # type: ignore[arg-type]
        if other.fence.request == message.fence.request:
            return (message,)
        self.num_swapped += 1
        return (replace(message, payload=other.payload, checksum=other.checksum),)


async def test_a_stale_block_reference_does_not_answer_with_another_prompts_kv(pod: Pod) -> None:
    """P reads blocks that by now hold another prompt. Intact bytes with their own right checksum: only the seeding of
    the checksum with the block's hash tells them apart."""
    p, d = await pod.prefill(), await pod.decode()
    swap = SwapPayloads()
    pod.forth = swap
    requests = [make_request(number, prompt_of(60, seed=number), temperature=0.7) for number in (1, 2)]
    for number, request in enumerate(requests, 1):
        send(p, d, request)
        await d.router.until(lambda number=number: num_finished(d) == number)
    assert swap.num_swapped > 0
    answers = {token.request: {} for token in d.router.tokens()}  # type: ignore[var-annotated]
    for token in [*p.router.tokens(), *d.router.tokens()]:
        answers[token.request][token.choice, token.position] = token.token
    for request in requests:
        assert answers[request.id] == alone(pod, request)
        p.tier.handle(Abort(request.id, FIRST))  # D has gone on without it
    await p.tier.drained()
    await until_idle(d)


async def test_kv_of_one_prompt_is_not_decoded_as_another(pod: Pod) -> None:
    """The router and P disagree on what the request's prompt is: D has two truths, and computes the router's itself."""
    p, d = await pod.prefill(), await pod.decode()
    asked, computed = make_request(1, prompt_of(60, seed=1)), make_request(1, prompt_of(60, seed=2))
    d.tier.handle(Attach(asked, FIRST, local=False, lease_s=LEASE_S))
    p.tier.handle(Prefill(computed, FIRST, d.peer, LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(d) == alone(pod, asked)
    await until_idle(d)


class Withhold:
    """Keeps back the frames of one request until it is told to let them through, behind others."""

    def __init__(self, request: RequestId) -> None:
        self._request = request
        self.kept: list[HandoffMessage] = []
        self.open = False

    def __call__(self, message: HandoffMessage) -> Sequence[HandoffMessage]:
        if isinstance(message, Frame) and message.fence.request == self._request and not self.open:
            self.kept.append(replace(message, payload=bytes(message.payload)))  # type: ignore[arg-type]
            return ()
        return (message,)


async def test_decode_pages_reused_while_the_writer_is_in_flight_are_not_overwritten(checkpoint: Path) -> None:
    """A request is aborted on D while P still writes; its pages go to the next request; then the late writes arrive."""
    pod = Pod(checkpoint, num_blocks=33)
    p, d = await pod.prefill(), await pod.decode()
    first, second = make_request(1, prompt_of(400, seed=1)), make_request(2, prompt_of(400, seed=2), temperature=0.9)
    withhold = Withhold(first.id)
    pod.forth = withhold
    send(p, d, first)
    await p.router.until(lambda: bool(p.router.tokens()))
    d.tier.handle(Abort(first.id, FIRST))
    await until_idle(d)
    p.tier.handle(Abort(first.id, FIRST))
    late: Fault = lambda message: (*withhold.kept, message)  # noqa: E731 - every message of the second brings them again
    pod.forth = late
    send(p, d, second)
    await d.router.until(lambda: num_finished(d) == 1)
    assert withhold.kept
    tokens = {(t.choice, t.position): t.token for t in d.router.tokens() if t.request == second.id}
    assert tokens == alone(pod, second)
    await p.tier.drained()
    await until_idle(p)
    await until_idle(d)
    await pod.close()


async def test_prefills_abort_reaches_decode_which_says_nothing(pod: Pod) -> None:
    """Only P hears of the abort, and no block has arrived yet. D must not go on from a prompt that is not there."""
    p, d = await pod.prefill(), await pod.decode()
    request = make_request(1, prompt_of(400))
    pod.forth = Withhold(request.id)
    send(p, d, request)
    await p.router.until(lambda: Stage.STREAMING in p.router.stages())
    p.tier.handle(Abort(request.id, FIRST))
    await d.router.until(lambda: bool(d.router.of(Rejected)))
    assert d.router.of(Rejected)[0].reason is RejectReason.PEER_LOST
    assert not d.router.tokens()
    await until_idle(d)
    await until_idle(p)
