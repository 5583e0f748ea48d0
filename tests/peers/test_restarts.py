"""How peers took a restarted process for the one before it, or two meetings for one, replayed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvtransfer.transport import Link
from proto.control import Attach, Peer, Prefill, Rejected, RejectReason
from proto.handoff import Fence, Grant, Offer, Stale, TransportOffer
from proto.ids import Epoch, Generation
from proto.request import Request
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
    served,
    until_idle,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("restarts"), "qwen3")


class Wires(Pod):
    """A pod whose links can be cut, as a killed process cuts them."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.links: list[Link] = []

    async def connect(self, peer: Peer) -> Link:
        link = await super().connect(peer)
        self.links.append(link)
        return link


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Wires]:
    pod = Wires(checkpoint)
    yield pod
    await pod.close()


def offer_of(d: Side, request: Request, prefill: str, generation: Generation = FIRST) -> Offer:
    layout = d.host.parts.facts.layout
    return Offer(
        fence=Fence(request.id, generation, Epoch(prefill), d.peer.epoch),
        layout=layout.fingerprint(),
        layout_text=layout.describe(),
        numerics=d.host.parts.facts.numerics,
        num_tokens=len(request.prompt),
        num_choices=1,
        hashes=tuple(d.host.parts.hasher.all_blocks(request.prompt, "")),
        transports=(TransportOffer("memory"),),
        lease_s=LEASE_S,
    )


async def test_a_prefill_worker_that_restarts_is_met_anew_and_nothing_stays_of_the_old_one(pod: Wires) -> None:
    """It dies between Grant and the first block. D frees at once, and takes the next incarnation's offer at once."""
    d = await pod.decode()
    request = make_request(1, prompt_of(100))
    d.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
    link = await pod.connect(d.peer)
    await link.send(offer_of(d, request, "p0-dead"))
    assert isinstance(await link.receive(), Grant)
    await link.close()
    await d.router.until(lambda: bool(d.router.of(Rejected)))
    assert d.router.of(Rejected)[0].reason is RejectReason.PEER_LOST
    await until_idle(d)
    p = await pod.prefill()
    send(p, d, request, Generation(2))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, request)
    await p.tier.drained()
    await until_idle(d)


async def test_a_decode_worker_that_restarts_is_not_written_to_by_who_meant_the_old_one(pod: Wires) -> None:
    """P was told to hand over to an incarnation that is gone; another one answers at its address."""
    p, d = await pod.prefill(), await pod.decode()
    old = Peer(d.peer.worker, Epoch("d0-before"), d.peer.address)
    request = make_request(1, prompt_of(100))
    p.tier.handle(Prefill(request, FIRST, old, LEASE_S))
    await p.router.until(lambda: bool(p.router.of(Rejected)))
    assert p.router.of(Rejected)[0].held, "the blocks are there for a decode worker that lives"
    assert await d.is_idle()
    p.tier.handle(Prefill(request, Generation(2), d.peer, LEASE_S))
    d.tier.handle(Attach(request, Generation(2), local=False, lease_s=LEASE_S))
    await d.router.until(lambda: num_finished(d) == 1)
    assert served(p, d) == alone(pod, request)


async def test_a_duplicate_rendezvous_id_is_stale_and_the_first_meeting_goes_on(pod: Wires) -> None:
    d = await pod.decode()
    request = make_request(1, prompt_of(100))
    d.tier.handle(Attach(request, FIRST, local=False, lease_s=LEASE_S))
    first, second = await pod.connect(d.peer), await pod.connect(d.peer)
    await first.send(offer_of(d, request, "p0"))
    assert isinstance(await first.receive(), Grant)
    await second.send(offer_of(d, request, "p1"))
    answer = await second.receive()
    assert isinstance(answer, Stale)
    assert answer.highest == FIRST
    await second.close()
    assert not d.router.of(Rejected), "the first one is not disturbed"
    assert not await d.is_idle()
    await first.close()
    await until_idle(d)


NAMES = """
from proto.hashing import BlockHasher
from proto.layout import KvLayout
from proto.request import derive_seed
hasher = BlockHasher("model", 16)
print([name.hex() for name in hasher.all_blocks(tuple(range(100)), "salt")])
print(KvLayout(2, 16, 4, 32, "float32", "digest").fingerprint(), derive_seed(7, 3))
"""


def test_processes_with_different_hash_seeds_name_blocks_alike() -> None:
    """Where block names come from Python's seeded hash(), P and D never agree and no prefix is ever found."""
    said = [
        subprocess.run(
            [sys.executable, "-c", NAMES],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "random")
    ]
    assert said[0].strip()
    assert said[0] == said[1] == said[2]
