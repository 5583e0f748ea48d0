"""A resume by way of the prefill worker that has the prompt in its cache: the tokens are those of one engine, whatever
was asked for, and only what nobody has is computed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from proto.control import Abort, Attach, Prefill, Redirect, Rejected, RejectReason
from proto.handoff import Frame, HandoffMessage
from proto.ids import Generation
from proto.lifecycle import Stage
from proto.request import FinishReason, Request, SamplingParams, TokenOut
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
    send,
    until_idle,
)

SECOND, THIRD = Generation(2), Generation(3)
LENGTH = 200
NUM_SENT = 9
"""Tokens that the client has when its decode worker dies."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resumes"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


async def asked_once(p: Side, d: Side, request: Request) -> list[TokenOut]:
    """The request as a first pair serves it, to its end."""
    send(p, d, request)
    await d.router.until(lambda: num_finished(d) == request.params.n)
    await p.tier.drained()
    tokens = {(token.choice, token.position): token for side in (p, d) for token in side.router.tokens()}
    for side in (p, d):
        side.router.received.clear()
    return [tokens[key] for key in sorted(tokens)]


def resumed(request: Request, tokens: list[TokenOut], num_sent: int = NUM_SENT) -> Request:
    forced = [tuple(t.token for t in tokens if t.choice == choice)[:num_sent] for choice in range(request.params.n)]
    return replace(request, forced=tuple(forced))


def heard(*sides: Side) -> list[TokenOut]:
    """Each position once, in order. What P says is preferred: it alone knows log probabilities of the first one."""
    tokens = {token.position: token for side in reversed(sides) for token in side.router.tokens()}
    return [tokens[position] for position in sorted(tokens)]


async def num_computed(side: Side) -> int:
    return await side.host.call(lambda core: core.stats.prompt_tokens_computed)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0.7, "logprobs": 3, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "sampled", "penalties", "logprobs"],
)
async def test_the_tokens_go_on_as_if_nothing_had_happened(pod: Pod, params: dict[str, float]) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(LENGTH), max_tokens=24, **params)
    whole = await asked_once(p, first, request)
    assert len(whole) == 24
    before = await num_computed(p)
    send(p, second, resumed(request, whole), SECOND)
    await second.router.until(lambda: num_finished(second) == 1)
    rest = heard(p, second)
    assert [replace(token, logprobs=None) for token in rest] == [
        replace(token, logprobs=None) for token in whole[NUM_SENT:]
    ]
    for one, other in zip(rest, whole[NUM_SENT:], strict=True):
        assert (one.logprobs is None) == (other.logprobs is None) == ("logprobs" not in params)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.rank == other.logprobs.rank
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
    assert p.router.tokens()[0].position == NUM_SENT, "the next token is the prefill worker's to say"
    assert second.router.stages()[0] is not Stage.QUEUED
    # The prompt's last, partial block and what was generated: the full blocks were cached.
    assert await num_computed(p) - before == LENGTH % 16 + NUM_SENT
    assert await num_computed(second) == 0
    for side in (p, first, second):
        await side.tier.drained()
        await until_idle(side)


async def test_what_ends_a_choice_is_counted_from_its_beginning(pod: Pod) -> None:
    """Stop tokens, ``min_tokens`` and ``max_tokens`` are where they would have been."""
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    free = make_request(1, prompt_of(LENGTH), max_tokens=40, temperature=1.0)
    tokens = alone(pod, free)
    early, late = tokens[0, 4], tokens[0, 20]
    params = SamplingParams(
        max_tokens=40, min_tokens=12, seed=1, temperature=1.0, ignore_eos=True, stop_token_ids=(early, late)
    ).checked()
    request = replace(free, params=params)
    whole = await asked_once(p, first, request)
    assert whole[-1].finish is not None
    assert len(whole) > NUM_SENT
    send(p, second, resumed(request, whole), SECOND)
    await second.router.until(lambda: num_finished(second) == 1)
    assert heard(p, second) == whole[NUM_SENT:]


async def test_a_request_that_its_next_token_ends_leaves_nothing_behind(pod: Pod) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(LENGTH), max_tokens=NUM_SENT + 1)
    whole = await asked_once(p, first, request)
    send(p, second, resumed(request, whole), SECOND)
    await p.router.until(lambda: num_finished(p) == 1)
    assert heard(p) == whole[NUM_SENT:]
    assert heard(p)[0].finish is FinishReason.LENGTH
    await p.tier.drained()
    await until_idle(p)
    await until_idle(second)


async def test_blocks_of_a_resume_are_redirected_like_any_others(pod: Pod) -> None:
    p, first, second, third = [await pod.prefill(), *[await pod.decode(f"d{number}") for number in range(3)]]
    request = make_request(1, prompt_of(LENGTH), max_tokens=24, temperature=0.8)
    whole = await asked_once(p, first, request)
    again = resumed(request, whole)
    second.tier.is_draining = True
    send(p, second, again, SECOND)
    await p.router.until(lambda: Stage.SEALED in p.router.stages())
    before = await num_computed(p)
    third.tier.handle(Attach(again, THIRD, local=False, lease_s=LEASE_S, positions=again.num_forced))
    p.tier.handle(Redirect(request.id, THIRD, third.peer))
    await third.router.until(lambda: num_finished(third) == 1)
    assert heard(p, third) == whole[NUM_SENT:]
    assert (await num_computed(p), await num_computed(third)) == (before, 0)


async def test_a_resume_whose_blocks_come_damaged_is_computed_where_it_arrived(pod: Pod) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(LENGTH), max_tokens=24, temperature=0.8)
    whole = await asked_once(p, first, request)

    def spoil(message: HandoffMessage) -> list[HandoffMessage]:
        if isinstance(message, Frame) and message.index == 5:
            return [replace(message, checksum=message.checksum ^ 1)]
        return [message]

    pod.forth = spoil
    send(p, second, resumed(request, whole), SECOND)
    await second.router.until(lambda: num_finished(second) == 1)
    assert heard(second) == whole[NUM_SENT:]
    assert Stage.QUEUED in second.router.stages()


async def test_choices_that_have_gone_different_ways_are_refused_by_the_prefill_worker(pod: Pod) -> None:
    """The router does not ask for it; should it, nobody hangs."""
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(LENGTH), max_tokens=24, n=2, temperature=1.0)
    whole = await asked_once(p, first, request)
    p.tier.handle(Prefill(resumed(request, whole), SECOND, second.peer, LEASE_S))
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    assert [each.reason for each in p.router.of(Rejected)] == [RejectReason.UNKNOWN], "no fault of the request's"
    await p.tier.drained()
    await until_idle(p)


async def test_a_resume_goes_ahead_of_new_work_and_past_a_full_queue(pod: Pod) -> None:
    p, first, second = await pod.prefill(), await pod.decode("d0"), await pod.decode("d1")
    request = make_request(1, prompt_of(LENGTH), max_tokens=24)
    whole = await asked_once(p, first, request)
    await p.host.call(lambda core: setattr(core, "_max_num_queued", 2))
    others = [make_request(number, prompt_of(400, seed=number)) for number in range(2, 7)]
    for other in others:
        p.tier.handle(Prefill(other, FIRST, second.peer, LEASE_S))
    send(p, second, resumed(request, whole), SECOND)
    await second.router.until(lambda: num_finished(second) == 1)
    said = [token.request for token in p.router.tokens()]
    assert said.index(request.id) <= 1, "only what ran already was before it"
    for other in others:
        for side in (p, second):
            side.tier.handle(Abort(other.id, FIRST))
    await p.tier.drained()
