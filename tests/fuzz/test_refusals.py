"""What cannot be read is counted, each message once, where it comes in; and it leaves nothing behind: no task, no
memory, no block. The inputs are those of ``scripts/fuzz``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import grpc
import grpc.aio
import pytest
from redis.asyncio import Redis

from kvtransfer.fences import Refusals, Refused
from kvtransfer.integrity import BlockChecksum
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.session import SendSession
from kvtransfer.transport import Link, LinkLost
from kvtransfer.transports import MEMORY
from kvtransfer.transports import grpc as handoff_link
from proto import wire
from proto.control import Hello, Peer, Role, Welcome
from proto.errors import RemoteProtocolError
from proto.handoff import (
    Ack,
    Adopted,
    Fence,
    Frame,
    Grant,
    HandoffMessage,
    Offer,
    Seal,
    SealedChoice,
    Stale,
    TransportOffer,
    Withdraw,
)
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.wire.envelope import summed
from service.rpc import RouterStream, StreamClosed, WorkerClient, serve, worker_handler
from tandem.local_redis import LocalRedis
from tests.support.checkpoints import make_checkpoint
from tests.support.fuzzing import damaged, inputs, split_entry, targets
from tests.support.handoff import Ear, Store, make_offer
from tests.support.http import ScriptedFlow, saying, served_model, serving
from tests.support.messages import bare_handoff, summed_handoff
from tests.support.tiers import Pod, Side, until_idle

NUM_INPUTS = 500
SEED = 21
NUM_WARM = 100
"""After so many inputs everything has been made that is kept for good."""
MOST_BYTES = 200
"""What may be there afterwards for each input: less than any message, task or session. (protobuf keeps memory, too.)"""
SETTLE_S = 30.0
TARGETS = {target.name: target for target in targets()}
FIRST = Generation(1)
PEER = Peer(WorkerId("d"), Epoch("d"), "d")
HELLO = Hello(Epoch("router"), Epoch(""), 1)
WELCOME = Welcome(WorkerId("d0"), Epoch("e1"), Role.DECODE, 1)

Feed = Callable[[bytes], Awaitable[None]]


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """pytest would keep each warning that is logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def is_handoff(data: bytes) -> bool:
    try:
        wire.decode_handoff(data)
    except RemoteProtocolError:
        return False
    return True


async def feed_all(
    data: Sequence[bytes], feed: Feed, count: Callable[[], int], is_taken: Callable[[bytes], bool]
) -> None:
    """Each refused input counts once; tasks and memory are at the end what they were once the first were through.

    ``feed`` returns when its input is dealt with. ``count``: how many were refused so far.
    """
    num_refused = 0
    tracemalloc.start()
    try:
        for number, each in enumerate(data):
            if number == NUM_WARM:
                num_tasks, num_bytes = len(asyncio.all_tasks()), _num_bytes()
            before = count()
            await feed(each)
            if not is_taken(each):  # what can be read may still be refused, for what it says
                num_refused += 1
                assert count() == before + 1, each
        async with asyncio.timeout(SETTLE_S):
            while len(asyncio.all_tasks()) > num_tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        grown = _num_bytes() - num_bytes
    finally:
        tracemalloc.stop()
    assert grown < MOST_BYTES * (len(data) - NUM_WARM)
    assert num_refused > len(data) / 4, "there is something to count"


def _num_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def fuzz(name: str) -> list[bytes]:
    return list(inputs(TARGETS[name], SEED, NUM_INPUTS))


class Call:
    """A call that came over gRPC: the client says ``words``, all but the first once it has been answered."""

    def __init__(self, *words: bytes) -> None:
        self.answers: list[bytes] = []
        self._words = deque(words)
        self._num_read = 0
        self._answered = asyncio.Event()

    async def read(self) -> object:
        if not self._words:
            return grpc.aio.EOF
        if self._num_read:
            await self._answered.wait()
        self._num_read += 1
        return self._words.popleft()

    async def write(self, data: bytes) -> None:
        self.answers.append(data)
        self._answered.set()

    def peer(self) -> str:
        return "a stranger"

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise ConnectionAbortedError(f"{code}: {details}")


class Method(grpc.HandlerCallDetails):
    def __init__(self, name: str) -> None:
        self.method = name
        self.invocation_metadata = ()


async def called(handler: grpc.GenericRpcHandler, method: str, call: Call) -> None:
    """As a server would call it, without the network."""
    found = handler.service(Method(method))
    assert found is not None
    with contextlib.suppress(ConnectionAbortedError):
        await found.stream_stream(None, call)


# ---- hand-offs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fuzz"), "qwen3")


@pytest.fixture
async def pod(checkpoint: Path) -> AsyncIterator[Pod]:
    pod = Pod(checkpoint)
    yield pod
    await pod.close()


def counted_by(side: Side) -> Callable[[], int]:
    return lambda: side.tier._fences.refusals[Refused.MALFORMED]


async def test_a_decode_worker_refuses_first_messages(pod: Pod) -> None:
    decode = await pod.decode()
    handler = handoff_link.handoff_handler(decode.tier.serve)

    async def feed(data: bytes) -> None:
        await called(handler, "/tandem.Handoff/Exchange", Call(data))

    await feed_all([summed_handoff(data) for data in fuzz("handoff")], feed, counted_by(decode), is_handoff)
    await until_idle(decode)


class Prompt:
    """What a prefill worker may say of a prompt that it offers again and again."""

    def __init__(self, decode: Side) -> None:
        parts = decode.host.parts
        self._layout = parts.facts.layout
        self._decode = decode.peer.epoch
        self._hashes = tuple(parts.hasher.all_blocks(range(5, 5 + 2 * self._layout.block_size), ""))
        self._payload = b"\x07" * self._layout.block_bytes

    def offer(self, generation: int) -> Offer:
        return Offer(
            fence=self._fence(generation),
            layout=self._layout.fingerprint(),
            layout_text=self._layout.describe(),
            numerics="numerics",
            num_tokens=2 * self._layout.block_size,
            num_choices=1,
            hashes=self._hashes,
            transports=(TransportOffer(MEMORY),),
            lease_s=30.0,
        )

    def rest(self, generation: int) -> list[HandoffMessage]:
        """What may follow the offer."""
        fence, sums = self._fence(generation), BlockChecksum(self._layout.block_bytes)
        frames = [Frame(fence, at, sums.of(self._payload, name), self._payload) for at, name in enumerate(self._hashes)]
        seal = Seal(fence, len(self._hashes), self._layout.block_size, (SealedChoice(7),))
        return [*frames, seal, Withdraw(fence, "the client left")]

    def _fence(self, generation: int) -> Fence:
        return Fence(RequestId("elsewhere.1"), Generation(generation), Epoch("p9"), self._decode)


async def test_a_decode_worker_that_has_reserved_blocks_refuses(pod: Pod) -> None:
    decode = await pod.decode()
    handler, prompt, rng = handoff_link.handoff_handler(decode.tier.serve), Prompt(decode), random.Random(SEED)
    data = []
    for generation in range(1, NUM_INPUTS + 1):
        spoken = wire.encode_handoff(rng.choice(prompt.rest(generation)))
        data.append(summed_handoff(damaged(bare_handoff(spoken), rng)))
    offers = (wire.encode_handoff(prompt.offer(generation)) for generation in range(1, NUM_INPUTS + 1))

    async def feed(each: bytes) -> None:
        call = Call(next(offers), each)
        await called(handler, "/tandem.Handoff/Exchange", call)
        assert isinstance(wire.decode_handoff(call.answers[0]), Grant)
        pod.orphans.clear()

    await feed_all(data, feed, counted_by(decode), is_handoff)
    await until_idle(decode)


class Answer:
    """A link to a decode worker that says one thing, and hangs up."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    async def send(self, message: HandoffMessage) -> None:
        """Nobody listens."""

    async def receive(self) -> HandoffMessage:
        data, self._data = self._data, None
        if data is None:
            raise LinkLost("the peer has closed the link")
        return wire.decode_handoff(data)

    async def close(self) -> None:
        self._data = None


async def test_a_prefill_worker_refuses_answers() -> None:
    offer, store, refusals, rng = make_offer(2), Store(2), Refusals(), random.Random(SEED)
    answers = (Grant(offer.fence, 0, MEMORY), Ack(offer.fence, 1), Adopted(offer.fence), Stale(offer.fence, FIRST))
    spoken = [wire.encode_handoff(rng.choice(answers)) for _ in range(NUM_INPUTS)]
    data = [summed_handoff(damaged(bare_handoff(each), rng)) for each in spoken]

    async def feed(each: bytes) -> None:
        async def connect(peer: Peer) -> Link:
            return Answer(each)

        ear = Ear()
        session = SendSession(offer, store, connect, PEER, ear, refusals=refusals)
        running = asyncio.create_task(session.run())
        while not {"held", "released"} & set(ear.told):  # noqa: ASYNC110
            await asyncio.sleep(0)
        session.withdraw("nobody else is there")
        await running
        assert ear.told[-1] == "released"

    await feed_all(data, feed, lambda: refusals[Refused.MALFORMED], is_handoff)


# ---- routers and workers ---------------------------------------------------------------------------------------------


async def never() -> NoReturn:
    raise AssertionError("nobody asked")


async def test_a_worker_refuses_what_a_router_says() -> None:
    refusals = Refusals()

    async def on_stream(stream: RouterStream) -> None:
        stream.send(WELCOME)
        with contextlib.suppress(StreamClosed):
            while True:
                await stream.receive()

    handler = worker_handler(never, never, on_stream, on_malformed=lambda: refusals.add(Refused.MALFORMED))

    async def feed(data: bytes) -> None:
        await called(handler, "/tandem.Worker/Serve", Call(wire.encode_from_router(HELLO), summed(data)))

    await feed_all(fuzz("from_router"), feed, lambda: refusals[Refused.MALFORMED], TARGETS["from_router"].survives)


class Babbler:
    """A worker that says ``words`` behind its Welcome, and to every question."""

    def __init__(self) -> None:
        self.words = b""
        self.handler = grpc.method_handlers_generic_handler(
            "tandem.Worker",
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self._answer),
                "Health": grpc.unary_unary_rpc_method_handler(self._answer),
                "Serve": grpc.stream_stream_rpc_method_handler(self._serve),
            },
        )

    async def _answer(self, question: bytes, context: object) -> bytes:
        return self.words

    async def _serve(self, requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()
        await context.write(wire.encode_from_worker(WELCOME))
        await context.write(self.words)


async def listen(client: WorkerClient) -> None:
    stream = await client.connect(HELLO)
    with contextlib.suppress(StreamClosed):
        while True:
            await stream.receive()
    await stream.close()


@pytest.mark.parametrize(
    ("name", "ask"), [("from_worker", listen), ("card", WorkerClient.describe), ("health", WorkerClient.health)]
)
async def test_a_router_refuses_what_a_worker_says(name: str, ask: Callable[[WorkerClient], Awaitable[object]]) -> None:
    worker, refusals = Babbler(), Counter[str]()

    def refused(reason: str) -> None:
        refusals[reason] += 1

    async def feed(data: bytes) -> None:
        worker.words = summed(data)
        with contextlib.suppress(RemoteProtocolError):
            await ask(client)

    server, port = await serve("127.0.0.1", 0, [worker.handler])
    client = WorkerClient(f"127.0.0.1:{port}", on_refused=refused)
    try:
        await feed_all(fuzz(name), feed, lambda: refusals["malformed"], TARGETS[name].survives)
    finally:
        await client.close()
        await server.stop(None)
    assert set(refusals) == {"malformed"}


# ---- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["worker_record", "handoff_record", "ledger_event"])
async def test_who_reads_the_ledger_skips_entries(ledger: RedisLedger, local_redis: LocalRedis, name: str) -> None:
    keys, data = ledger.keys, [each for each in fuzz(name) if each]
    async with Redis.from_url(local_redis.url) as raw, raw.pipeline() as writes:
        for number, each in enumerate(data):
            if name == "worker_record":
                writes.hset(keys.workers, f"w{number}", "e").set(keys.worker(f"w{number}"), each)
            elif name == "handoff_record":
                writes.zadd(keys.handoffs, {f"r.{number}": number}).hset(keys.handoff(f"r.{number}"), "record", each)
            else:
                writes.xadd(keys.events, split_entry(each) or {b"": b""})
        await writes.execute()
    if name == "worker_record":
        await ledger.members()
    elif name == "handoff_record":
        await ledger.open_handoffs()
    else:
        await ledger.read_events_until("0-0", "+", most=len(data))
    assert ledger.counts.num_malformed == sum(not TARGETS[name].survives(each) for each in data) > len(data) / 4


# ---- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("completion", "/v1/completions"), ("chat", "/v1/chat/completions")])
async def test_a_router_refuses_what_a_client_says(name: str, path: str) -> None:
    flow, num_errors = ScriptedFlow(saying(served_model(), "well")), 0
    async with serving(flow, served_model()) as site:

        async def feed(data: bytes) -> None:
            nonlocal num_errors
            async with site.http.post(path, data=data, headers={"Content-Type": "application/json"}) as reply:
                await reply.read()
            while not site.metrics.requests:  # noqa: ASYNC110
                await asyncio.sleep(0)
            ((route, _, status),) = site.metrics.requests
            assert (route, status) == (path, reply.status)
            num_errors += status >= 400
            assert all(stream.num_closed for stream in flow.streams)
            for told in (site.metrics.requests, site.metrics.stages, flow.requests, flow.streams):
                told.clear()

        await feed_all(fuzz(name), feed, lambda: num_errors, TARGETS[name].survives)
