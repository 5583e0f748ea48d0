"""The stream between a router and a worker, over loopback and against a real process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from proto.control import Abort, FromRouter, FromWorker, Hello, Load, LoadReport, ModelCard, Role, Tokens, Welcome
from proto.errors import NoWorker, Overloaded, RemoteProtocolError
from proto.health import HealthReport, Phase
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.request import TokenOut
from proto.wire import encode_from_router
from service.rpc import RouterStream, StreamClosed, WorkerClient, channel, serve, worker_handler
from service.rpc.duplex import Duplex

HELLO = Hello(Epoch("router"), Epoch(""), 1)
WELCOME = Welcome(WorkerId("d0"), Epoch("e1"), Role.DECODE, 1)
CARD = ModelCard("m", ("m",), "d", 64, 100, (2,), 16, "l", "ns", {"tokenizer.json": b"x" * (5 << 20)})


async def describe() -> ModelCard:
    return CARD


async def healthy() -> HealthReport:
    return HealthReport(Phase.READY, is_ready=True)


@asynccontextmanager
async def worker(
    on_stream: Callable[[RouterStream], Awaitable[None]],
    describe: Callable[[], Awaitable[ModelCard]] = describe,
    max_outbox: int = 100,
    silence_s: float = 10.0,
    refusals: list[str] | None = None,
) -> AsyncIterator[WorkerClient]:
    """``refusals`` is told of what either side does not take."""
    told = [] if refusals is None else refusals
    handler = worker_handler(
        describe, healthy, on_stream, max_outbox, on_malformed=lambda: told.append("malformed, by the worker")
    )
    server, port = await serve("127.0.0.1", 0, [handler], silence_s=silence_s)
    client = WorkerClient(f"127.0.0.1:{port}", on_refused=told.append)
    try:
        yield client
    finally:
        await client.close()
        await server.stop(None)


@dataclass
class Recorder:
    """Welcomes a router and keeps what it says."""

    messages: list[FromRouter] = field(default_factory=list)
    streams: asyncio.Queue[RouterStream] = field(default_factory=asyncio.Queue)
    ended: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def __call__(self, stream: RouterStream) -> None:
        stream.send(WELCOME)
        self.streams.put_nowait(stream)
        try:
            while True:
                self.messages.append(await stream.receive())
        except StreamClosed as end:
            self.ended.set_result(str(end))


async def test_messages_travel_both_ways_in_order() -> None:
    async def answer(stream: RouterStream) -> None:
        stream.send(WELCOME)
        for _ in range(20):
            message = await stream.receive()
            assert isinstance(message, Abort)
            token = TokenOut(message.request, 0, 0, int(message.generation))
            stream.send(Tokens(((message.request, message.generation),), (token,)))

    async with worker(answer) as client:
        stream = await client.connect(HELLO)
        assert stream.welcome == WELCOME
        for generation in range(1, 21):
            stream.send(Abort(RequestId("router.1"), Generation(generation)))
        for generation in range(1, 21):
            tokens = await stream.receive()
            assert isinstance(tokens, Tokens)
            assert tokens.tokens[0].token == generation
        with pytest.raises(StreamClosed):
            await stream.receive()
        assert stream.is_closed
        await stream.close()


async def test_what_a_worker_says_of_itself() -> None:
    async with worker(Recorder()) as client:
        assert await client.describe() == CARD
        assert await client.health() == HealthReport(Phase.READY, is_ready=True)


async def test_a_named_error_of_the_worker_is_the_answer() -> None:
    async def loading() -> ModelCard:
        raise NoWorker("still loading weights")

    async def full(stream: RouterStream) -> None:
        raise Overloaded("too many routers")

    async with worker(full, loading) as client:
        with pytest.raises(NoWorker, match="still loading weights"):
            await client.describe()
        with pytest.raises(NoWorker, match="too many routers"):
            await client.connect(HELLO)


async def test_the_last_words_of_a_worker_arrive() -> None:
    async def brief(stream: RouterStream) -> None:
        stream.send(WELCOME)
        for running in range(50):
            stream.send(LoadReport(Load(num_running=running)))

    async with worker(brief) as client:
        stream = await client.connect(HELLO)
        reports = [await stream.receive() for _ in range(50)]
        assert reports == [LoadReport(Load(num_running=running)) for running in range(50)]
        with pytest.raises(StreamClosed, match="closed the stream"):
            await stream.receive()
        await stream.close()


async def test_closing_delivers_what_was_sent_and_tells_the_worker() -> None:
    recorder = Recorder()
    async with worker(recorder) as client:
        stream = await client.connect(HELLO)
        for generation in range(1, 11):
            stream.send(Abort(RequestId("router.1"), Generation(generation)))
        await stream.close()
        await stream.close()
        stream.send(Abort(RequestId("router.1"), Generation(11)))  # dropped: it is over
        await recorder.ended
        assert [message.generation for message in recorder.messages if isinstance(message, Abort)] == list(range(1, 11))


async def test_another_incarnation_is_no_worker() -> None:
    refusals: list[str] = []
    async with worker(Recorder(), refusals=refusals) as client:
        with pytest.raises(NoWorker, match="another process"):
            await client.connect(Hello(Epoch("router"), Epoch("older"), 1))
    assert refusals == ["foreign_epoch"]


@pytest.mark.parametrize("expected", ["", "older"], ids=["welcome", "another incarnation"])
async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(
    expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or whoever gives a worker up waits for ever for its task."""
    original = Duplex.receive

    async def receive_and_be_cancelled(self: Duplex[FromWorker, FromRouter]) -> FromWorker:
        message = await original(self)
        if isinstance(message, Welcome):
            task.cancel()
        return message

    async def connect_and_go_on(client: WorkerClient) -> None:
        with contextlib.suppress(NoWorker):
            await client.connect(Hello(Epoch("router"), Epoch(expected), 1))
        await asyncio.sleep(3600)

    monkeypatch.setattr(Duplex, "receive", receive_and_be_cancelled)
    async with worker(Recorder()) as client:
        task = asyncio.create_task(connect_and_go_on(client))
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()


async def test_nobody_listening_is_no_worker() -> None:
    async with worker(Recorder()) as client:
        address = client.address
    away = WorkerClient(address)
    with pytest.raises(NoWorker, match=address):
        await away.connect(HELLO)
    with pytest.raises(NoWorker, match=address):
        await away.health()
    await away.close()


async def test_a_silent_worker_is_no_worker() -> None:
    async def silent(stream: RouterStream) -> None:
        with pytest.raises(StreamClosed):
            await stream.receive()

    async with worker(silent) as client:
        with pytest.raises(NoWorker, match="no answer"):
            await client.connect(HELLO, timeout_s=0.05)


async def test_a_worker_that_does_not_say_welcome_first() -> None:
    async def rude(stream: RouterStream) -> None:
        stream.send(LoadReport(Load()))

    refusals: list[str] = []
    async with worker(rude, refusals=refusals) as client:
        with pytest.raises(RemoteProtocolError, match="LoadReport"):
            await client.connect(HELLO)
    assert refusals == ["malformed"]


async def test_a_card_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.rpc.worker.encode_card", lambda card: b"\xff\xff")
    refusals: list[str] = []
    async with worker(Recorder(), refusals=refusals) as client:
        with pytest.raises(RemoteProtocolError):
            await client.describe()
    assert refusals == ["malformed"]


async def test_a_router_that_does_not_say_hello_first() -> None:
    refusals: list[str] = []
    async with worker(Recorder(), refusals=refusals) as client, channel(client.address) as raw:
        call = raw.stream_stream("/tandem.Worker/Serve")()
        await call.write(encode_from_router(Abort(RequestId("router.1"), Generation(1))))
        with pytest.raises(grpc.aio.AioRpcError, match="Abort where Hello comes first"):
            await call.read()
    assert refusals == ["malformed, by the worker"]


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 40, b"\x08\x01"])
async def test_garbage_ends_the_stream_and_not_the_worker(garbage: bytes) -> None:
    refusals: list[str] = []
    async with worker(Recorder(), refusals=refusals) as client, channel(client.address) as raw:
        call = raw.stream_stream("/tandem.Worker/Serve")()
        await call.write(garbage)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await client.describe() == CARD
    assert refusals == ["malformed, by the worker"]


async def test_garbage_in_mid_stream_reaches_the_tier_as_an_end() -> None:
    recorder = Recorder()
    async with worker(recorder) as client, channel(client.address) as raw:
        call = raw.stream_stream("/tandem.Worker/Serve")()
        await call.write(encode_from_router(HELLO))
        await call.read()
        await call.write(b"\xff\xff")
        assert "broke the protocol" in await recorder.ended
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await call.read()


async def test_a_router_that_does_not_read_loses_its_stream() -> None:
    recorder = Recorder()
    async with worker(recorder, max_outbox=10) as client:
        stream = await client.connect(HELLO)
        theirs = await recorder.streams.get()
        for _ in range(12):  # without a pause, so nothing can be written in between
            theirs.send(LoadReport(Load()))
        assert theirs.is_closed
        assert "left 10 messages unread" in await recorder.ended
        with pytest.raises(StreamClosed):
            await stream.receive()
        await stream.close()


async def test_a_worker_that_reads_slowly_slows_its_router_down_and_loses_nothing() -> None:
    gate = asyncio.Event()
    seen: list[FromRouter] = []
    done = asyncio.Event()

    async def slow(stream: RouterStream) -> None:
        stream.send(WELCOME)
        await gate.wait()
        seen.extend([await stream.receive() for _ in range(3000)])
        done.set()

    async with worker(slow) as client:
        stream = await client.connect(HELLO)
        for generation in range(1, 3001):
            stream.send(Abort(RequestId("router.1"), Generation(generation)))
        gate.set()
        await done.wait()
        assert [message.generation for message in seen if isinstance(message, Abort)] == list(range(1, 3001))
        await stream.close()


WORKER_PROCESS = """
import asyncio, sys
from proto.control import Role, Welcome
from service.rpc import StreamClosed, serve, worker_handler

async def never(): raise AssertionError

async def on_stream(stream):
    stream.send(Welcome("d0", "e1", Role.DECODE, 1))
    try:
        await stream.receive()
    except StreamClosed:
        print("closed", flush=True)

async def main():
    server, port = await serve("127.0.0.1", 0, [worker_handler(never, never, on_stream)])
    print(port, flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""

ROUTER_PROCESS = """
import asyncio, sys
from proto.control import Hello
from service.rpc import WorkerClient

async def main():
    stream = await WorkerClient(sys.argv[1]).connect(Hello("router", "", 1))
    print("connected", flush=True)
    await stream.receive()

asyncio.run(main())
"""


async def start_process(program: str, *arguments: str) -> tuple[asyncio.subprocess.Process, str]:
    """A running process and the first line it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


async def test_a_killed_worker_is_noticed_by_its_router() -> None:
    process, port = await start_process(WORKER_PROCESS)
    client = WorkerClient(f"127.0.0.1:{port}")
    stream = await client.connect(HELLO)
    waiting = asyncio.create_task(stream.receive())
    process.send_signal(signal.SIGKILL)
    async with asyncio.timeout(5):  # far below keepalive's 10 s: it is the closed connection that tells
        with pytest.raises(StreamClosed, match="lost"):
            await waiting
    with pytest.raises(NoWorker):
        await client.connect(HELLO)
    await stream.close()
    await client.close()
    await process.communicate()


async def test_a_stopped_worker_is_noticed_by_its_silence() -> None:
    process, port = await start_process(WORKER_PROCESS)
    client = WorkerClient(f"127.0.0.1:{port}", silence_s=0.5)
    stream = await client.connect(HELLO)
    process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(10):
        with pytest.raises(StreamClosed, match="lost"):
            await stream.receive()
    await stream.close()
    await client.close()
    process.kill()
    await process.communicate()


async def test_a_stopped_router_is_noticed_by_its_silence() -> None:
    recorder = Recorder()
    async with worker(recorder, silence_s=0.5) as client:
        process, line = await start_process(ROUTER_PROCESS, client.address)
        assert line == "connected"
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(10):
            await recorder.ended
        process.kill()
        await process.communicate()


async def test_a_killed_router_is_noticed_by_its_worker() -> None:
    recorder = Recorder()
    async with worker(recorder) as client:
        process, line = await start_process(ROUTER_PROCESS, client.address)
        assert line == "connected"
        process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(5):
            await recorder.ended
        await process.communicate()
