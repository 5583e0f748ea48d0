"""A stack to be harmed: real processes on a real Redis, each worker behind a proxy, and a client that notes when.

Everything runs on the event loop that calls ``start``. Knows how to hurt, and how to tell that all is well again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from bench.chaos.proxy import Proxy, Weather
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Role
from proto.settings import LedgerSettings, RouterSettings
from tandem.local import StackSettings, child_groups
from tandem.local_redis import LocalRedis
from tandem.machine import Machine
from tandem.options import settings_environ
from tandem.supervisor import Child, ChildSpec, Supervisor
from tests.support.redis import clear_disk, give_memory

ROUTER = "router"
READY_S = 90.0
SETTLE_S = 60.0
"""How long blocks and records of lost requests may stay: longer than a lease."""
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000
_INTO_FILE = 'exec "$@" >> "$0" 2>&1'
_NO_RESERVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Larger pieces of memory are the system's again at once, so that a step notices when it has none to give."""


@dataclass
class Worker:
    name: str
    role: Role
    child: Child
    proxy: Proxy
    http_port: int

    @property
    def pid(self) -> int:
        assert self.child.pid is not None, f"{self.name} is not running"
        return self.child.pid


@dataclass
class Answer:
    """What a client got. ``arrivals``: when each piece with tokens came."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def has(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens and self.finish is None and self.error is None:
            self.changed.clear()
            await self.changed.wait()

    def pause_after(self, moment: float) -> float:
        """Seconds from ``moment`` to the next token, or to the longest silence after it, if that is longer."""
        times = [moment, *(at for at in self.arrivals if at > moment)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class Arena:
    """``start``, then any number of rounds (``ask``, harm, ``settled``), then ``stop``. ``logs`` is a folder."""

    def __init__(self, settings: StackSettings, logs: Path) -> None:
        self._settings = settings
        self._logs = logs
        self._lines: list[str] = []
        self.redis = LocalRedis()
        self.workers: list[Worker] = []
        self.router: Child
        self._stopping = asyncio.Event()
        self._supervising: asyncio.Task[None] | None = None
        self._port = free_port()
        self._stopped: set[int] = set()
        self._http: aiohttp.ClientSession

    # Start and stop.

    async def start(self) -> None:
        await self.redis.start()
        ledger = LedgerSettings(redis=self.redis.url, heartbeat_s=0.3, heartbeat_ttl_s=2.0)
        router: RouterSettings = replace(self._settings.router, host="127.0.0.1", port=self._port)
        self._settings = replace(self._settings, ledger=ledger, router=router)
        groups = child_groups(self._settings, Machine(cores=2), is_private=True)
        wired = [[await self._wire(spec) for spec in group] for group in groups]
        self._supervisor = Supervisor(wired, lambda name, line: self._lines.append(f"{name}: {line}"), lambda _: 0.1)
        children = {child.spec.name: child for child in self._supervisor.children}
        self.router = children[ROUTER]
        for worker in self.workers:
            worker.child = children[worker.name]
        self._supervising = asyncio.create_task(self._supervisor.run(self._stopping))
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        await self.ready()

    async def _wire(self, spec: ChildSpec) -> ChildSpec:
        """Each writes its log into a file. A worker listens at one place for good, and is known by its proxy's."""
        log = self._logs / f"{spec.name}.log"
        argv = ("/bin/sh", "-c", _INTO_FILE, str(log), *spec.argv)
        spec = replace(spec, argv=argv, environ={**spec.environ, **_NO_RESERVE})
        if spec.name == ROUTER:
            return spec
        port, http_port = free_port(), free_port()
        proxy = Proxy(("127.0.0.1", port), self._kind_of)
        await proxy.start()
        role = Role.PREFILL if spec.name.startswith("prefill") else Role.DECODE
        self.workers.append(Worker(spec.name, role, None, proxy, http_port))  # type: ignore[arg-type]
        mine = replace(
            self._settings.worker,
            worker_id=spec.name,
            host="127.0.0.1",
            port=port,
            http_port=http_port,
            advertise=f"127.0.0.1:{proxy.port}",
        )
        return replace(spec, environ={**spec.environ, **settings_environ([mine])})

    def _kind_of(self, pid: int) -> str:
        if pid == self.router.pid:
            return ROUTER
        return next((worker.role.value for worker in self.workers if worker.child.pid == pid), "unknown")

    async def stop(self) -> None:
        self.wake_all()
        self.fair_weather()
        self._stopping.set()
        if self._supervising is not None:
            await asyncio.wait([self._supervising])
        for worker in self.workers:
            await worker.proxy.stop()
        await self._http.close()
        await self.redis.stop()

    # Who is who.

    @property
    def transport(self) -> str:
        """How payloads travel."""
        (transport,) = self._settings.worker.transports
        return transport

    @property
    def num_pool_tokens(self) -> int:
        """What one worker's KV memory holds."""
        cache = self._settings.engine.cache
        assert cache.num_gpu_blocks_override is not None
        return cache.num_gpu_blocks_override * cache.block_size

    @property
    def processes(self) -> list[Child]:
        """All but Redis."""
        return self._supervisor.children

    def of(self, role: Role) -> list[Worker]:
        return [worker for worker in self.workers if worker.role is role]

    def asked(self, role: Role) -> Worker:
        """The worker of that tier that the router has sent most to since the weather was last fair."""
        return max(self.of(role), key=lambda worker: worker.proxy.weather(ROUTER).num_sent)

    async def seen(self, role: Role, kind: str, condition: Callable[[Weather], bool]) -> None:
        """Waits until ``condition`` holds for what clients of ``kind`` send to one worker of that tier."""
        weathers = [worker.proxy.weather(kind) for worker in self.of(role)]
        while not any(condition(weather) for weather in weathers):
            waits = [asyncio.ensure_future(weather.changed.wait()) for weather in weathers]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    # Harm.

    def kill(self, worker: Worker) -> None:
        self._stopped.discard(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)

    def freeze(self, worker: Worker) -> None:
        os.kill(worker.pid, signal.SIGSTOP)
        self._stopped.add(worker.pid)

    def wake(self, worker: Worker) -> None:
        if worker.child.pid in self._stopped:
            os.kill(worker.pid, signal.SIGCONT)
            self._stopped.discard(worker.pid)

    def wake_all(self) -> None:
        for worker in self.workers:
            self.wake(worker)

    def limit(self, child: Child, kind: int, most: int | None) -> None:
        """One of the system's limits on a living process: ``kind`` is of ``resource``; None lifts it."""
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                soft = resource.RLIM_INFINITY if most is None else most
                resource.prlimit(child.pid, kind, (soft, resource.RLIM_INFINITY))

    def fair_weather(self) -> None:
        for worker in self.workers:
            worker.proxy.clear()

    async def relieve(self) -> None:
        """Whatever is wrong is made good, as far as that is in our hands."""
        self.fair_weather()
        self.wake_all()
        for child in self.processes:
            for kind in (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
                self.limit(child, kind, None)
        if self.redis.pid is None:
            await self.redis.start()
        os.kill(self.redis.pid, signal.SIGCONT)
        await give_memory(self.redis)
        await clear_disk(self.redis)

    # Asking.

    async def ask(self, prompt: list[int], answer: Answer, **params: Any) -> None:
        """Fills ``answer`` as tokens come; what goes wrong is in ``answer.error``."""
        body = {"model": "tiny", "prompt": prompt, "stream": True, "return_token_ids": True, **params}
        try:
            async with self._http.post(f"http://127.0.0.1:{self._port}/v1/completions", json=body) as reply:
                if reply.status != 200:
                    answer.error = f"{reply.status}: {await reply.text()}"
                async for line in reply.content:
                    self._take(line, answer)
        except aiohttp.ClientError as error:
            answer.error = repr(error)
        finally:
            if answer.finish is None and answer.error is None:
                answer.error = "the stream ended early"
            answer.changed.set()

    def _take(self, line: bytes, answer: Answer) -> None:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            return
        chunk = json.loads(line[6:])
        if "error" in chunk:
            answer.error = json.dumps(chunk["error"])
            return
        for choice in chunk["choices"]:
            if ids := choice.get("token_ids"):
                answer.tokens += ids
                answer.arrivals.append(time.monotonic())
            answer.finish = choice.get("finish_reason") or answer.finish
        answer.changed.set()

    # Is all well?

    async def ready(self) -> None:
        """Until the router serves with every worker that there should be."""

        async def is_ready() -> bool:
            for worker in self.workers:
                async with self._http.get(f"http://127.0.0.1:{worker.http_port}/health") as reply:
                    if reply.status != 200:
                        return False
            async with self._http.get(f"http://127.0.0.1:{self._port}/ready") as reply:
                if reply.status != 200:
                    return False
                details = (await reply.json())["details"]
            known = (details["prefill_workers"], details["decode_workers"])
            return known == (len(self.of(Role.PREFILL)), len(self.of(Role.DECODE)))

        await self._eventually(is_ready, READY_S, "the stack did not become ready")

    async def settled(self) -> None:
        """Until every block of every pool is free or cached, and the ledger has no open hand-off."""
        await self._eventually(self._has_closed_handoffs, SETTLE_S, "hand-offs stay open on the ledger")
        await self.freed()

    async def freed(self) -> None:
        for worker in self.workers:
            await self._eventually(lambda worker=worker: self._is_free(worker), SETTLE_S, f"{worker.name} holds blocks")

    async def _has_closed_handoffs(self) -> bool:
        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            return not await ledger.open_handoffs()

    async def _is_free(self, worker: Worker) -> bool:
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
        page = await self.metrics(worker.http_port)
        return all(total(page, name) == 0 for name in names)

    async def metrics(self, port: int) -> str:
        async with self._http.get(f"http://127.0.0.1:{port}/metrics") as reply:
            return await reply.text()

    async def computed(self, workers: Iterable[Worker]) -> int:
        """Prompt tokens that they have computed, since they started."""
        pages = [await self.metrics(worker.http_port) for worker in workers]
        return int(sum(total(page, "vllm:prompt_tokens_total") for page in pages))

    async def transports_used(self) -> set[str]:
        """Over which ways KV has travelled, between the workers as they are now."""
        pages = [await self.metrics(worker.http_port) for worker in self.workers]
        return set(re.findall(r'^tandem_kv_transfer_bytes_total\{.*transport="(\w+)"', "\n".join(pages), re.MULTILINE))

    def log_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._logs.iterdir())

    async def recoveries(self) -> Counter[str]:
        """How often the router has done what, since it started."""
        page = await self.metrics(self._port)
        found = re.findall(r'^tandem_recoveries_total\{.*remedy="(\w+)".*\} (\S+)$', page, re.MULTILINE)
        return Counter({remedy: int(float(count)) for remedy, count in found})

    async def _eventually(self, condition: Callable[[], Awaitable[bool]], within_s: float, otherwise: str) -> None:
        """HTTP has no way to wait, so this asks until it is so."""
        deadline = time.monotonic() + within_s
        while True:
            assert self._supervising is not None
            if self._supervising.done():
                self._supervising.result()  # which process failed for good, and why
            try:
                if await condition():
                    return
            except (aiohttp.ClientError, OSError):
                pass
            assert time.monotonic() < deadline, "\n".join([otherwise, *self._last_words()])
            await asyncio.sleep(0.1)

    def _last_words(self) -> list[str]:
        logs = (path.read_text(errors="replace").splitlines()[-30:] for path in sorted(self._logs.iterdir()))
        return [*self._lines[-20:], *itertools.chain.from_iterable(logs)]


def total(page: str, name: str) -> float:
    """The sum over all labels of one metric."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(float(value) for value in values)


def free_port() -> int:
    """A port that is free, and that the system gives to nobody who did not ask for it: a worker comes back to it."""
    lowest, highest = map(int, _GIVEN_PORTS.read_text().split())
    ports = [port for port in range(_LOWEST_PORT, 1 << 16) if not lowest <= port <= highest]
    random.shuffle(ports)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")
