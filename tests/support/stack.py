"""The whole stack as its user starts it: every tier a process of its own, on loopback, with a Redis of its own."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

from kvtransfer.ledger.records import HandoffRecord
from kvtransfer.ledger.redis import RedisLedger
from proto.settings import (
    CacheSettings,
    EngineSettings,
    LedgerSettings,
    LocalSettings,
    LogSettings,
    ModelSettings,
    RouterSettings,
    RpcSettings,
    SchedulerSettings,
    WorkerSettings,
)
from tandem.local import LocalStack, Ready, StackSettings
from tandem.machine import Machine
from tandem.supervisor import ChildSpec

READY_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0


def stack_settings(
    model: Path | str,
    *,
    prefill: int = 1,
    decode: int = 1,
    transports: tuple[str, ...] = ("auto",),
    num_blocks: int = 600,
    max_model_len: int = 1024,
    chunk: int = 256,
    dtype: str = "float32",
    policy: str = "priority",
    router: RouterSettings | None = None,
) -> StackSettings:
    """A small stack; by default every prompt goes through a prefill worker."""
    return StackSettings(
        local=LocalSettings(prefill=prefill, decode=decode),
        engine=EngineSettings(
            model=ModelSettings(
                model=str(model),
                served_model_name=("tiny",),
                dtype=dtype,
                device="cpu",
                threads=1,
                max_model_len=max_model_len,
            ),
            cache=CacheSettings(num_gpu_blocks_override=num_blocks),
            scheduler=SchedulerSettings(max_num_batched_tokens=chunk, scheduling_policy=policy),
        ),
        ledger=LedgerSettings(),
        worker=WorkerSettings(transports=transports, drain_timeout=10.0),
        router=replace(router or RouterSettings(disagg_threshold=0), host="127.0.0.1", port=0),
        log=LogSettings(log_level="warning"),
        rpc=RpcSettings(),
    )


Wire = Callable[[ChildSpec], ChildSpec]


def as_it_is(spec: ChildSpec) -> ChildSpec:
    return spec


class Stack:
    """A running stack, driven from another thread's event loop. ``lines`` is what its processes said."""

    def __init__(self, settings: StackSettings, wire: Wire = as_it_is) -> None:
        self.lines: list[str] = []
        self._settings = settings
        self._wire = wire
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self.ready: Ready
        self.local: LocalStack
        self._thread = threading.Thread(target=self._main, name="stack", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if not self._is_ready.wait(READY_TIMEOUT_S) or self._error is not None:
            self.stop()
            raise RuntimeError("the stack did not start:\n" + "\n".join(self.lines[-50:])) from self._error

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(READY_TIMEOUT_S)
        assert not self._thread.is_alive(), "the stack did not stop"

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:
                self._error = error
                self._is_ready.set()

    async def _serve(self) -> None:
        machine = Machine(cores=2)
        self.local = LocalStack(self._settings, machine, say=self._say, on_ready=self._became_ready, wire=self._wire)
        await self.local.start()
        running = asyncio.create_task(self.local.run())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            running.cancel()
            stopping.cancel()
            await asyncio.wait([running, stopping])
            await self.local.stop()

    def _say(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")

    def _became_ready(self, ready: Ready) -> None:
        self.ready = ready
        self._is_ready.set()

    # What a test asks.

    @property
    def base_url(self) -> str:
        """For OpenAI clients: ends in /v1."""
        return self.ready.url

    @property
    def root_url(self) -> str:
        return self.ready.url.removesuffix("/v1")

    def metric(self, name: str, url: str | None = None) -> float:
        """The sum over all labels of one metric of the router, or of the process at ``url``."""
        with urllib.request.urlopen(f"{url or self.root_url}/metrics", timeout=10) as reply:
            page = reply.read().decode()
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(float(value) for value in values)

    def worker_urls(self) -> list[str]:
        return [f"http://{record.http_address}" for record in self.ready.workers]

    def open_handoffs(self) -> list[HandoffRecord]:
        async def read() -> list[HandoffRecord]:
            async with RedisLedger.from_settings(self.local.ledger) as ledger:
                return await ledger.open_handoffs()

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result(10)

    def _holds_no_blocks(self, url: str) -> bool:
        try:
            return self.metric("vllm:kv_cache_usage_perc", url) == 0
        except URLError:
            return False  # it is being started again

    def assert_nothing_leaks(self) -> None:
        """Within a while, every block of every pool is free or cached, and the ledger holds no open hand-off."""
        _eventually(lambda: not self.open_handoffs(), "hand-offs stay open on the ledger")
        for url in self.worker_urls():
            _eventually(lambda url=url: self._holds_no_blocks(url), f"{url} still holds blocks")
            assert self.metric("vllm:num_requests_running", url) == 0
            assert self.metric("vllm:num_requests_waiting", url) == 0


def _eventually(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@contextmanager
def running(settings: StackSettings, wire: Wire = as_it_is) -> Iterator[Stack]:
    stack = Stack(settings, wire)
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()
