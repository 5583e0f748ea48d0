"""A stack to be harmed: real processes and a real Redis, each behind a proxy, and a client that notes when.

Everything runs on the event loop that calls ``start``. Knows how to hurt, and how to tell that all is well again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from bench.chaos.proxy import Proxy, Weather
from kvtransfer.ledger.records import HandoffRecord, LedgerAway, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Role
from proto.ids import Epoch
from proto.lifecycle import Stage
from proto.settings import LedgerSettings, RouterSettings
from tandem.local import StackSettings, child_groups
from tandem.local_redis import LocalRedis
from tandem.machine import Machine
from tandem.options import settings_environ
from tandem.supervisor import Child, ChildSpec, Supervisor
from tests.support.answer import Answer, Gate
from tests.support.ports import free_ports
from tests.support.redis import clear_disk, give_memory

ROUTER = "router"
KINDS = (ROUTER, *(role.value for role in Role))
"""Of clients, as proxies know them."""
READY_S = 90.0
SETTLE_S = 60.0
"""How long blocks and records of lost requests may stay: longer than a lease."""
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
class Router:
    name: str
    child: Child
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Arena:
    """``start``, then any number of rounds (``ask``, harm, ``settled``), then ``stop``. ``logs`` is a folder.

    Routers are known by their numbers, from 0. All of them have the same workers.
    """

    def __init__(self, settings: StackSettings, logs: Path, *, num_routers: int = 1) -> None:
        self._settings = settings
        self._logs = logs
        self._lines: list[str] = []
        self._ports = free_ports()
        redis_port = next(self._ports)
        self.redis = LocalRedis(port=redis_port)
        self.redis_proxy = Proxy(("127.0.0.1", redis_port), self._kind_of)
        """On everybody's way to Redis but ours."""
        self.workers: list[Worker] = []
        self.routers: list[Router] = []
        self._num_routers = num_routers
        self._stopping = asyncio.Event()
        self._supervising: asyncio.Task[None] | None = None
        self._stopped: set[int] = set()
        self._http: aiohttp.ClientSession

    # Start and stop.

    async def start(self) -> None:
        await self.redis.start()
        await self.redis_proxy.start()
        ledger = LedgerSettings(redis=self.redis.url, heartbeat_s=0.3, heartbeat_ttl_s=2.0)
        self._settings = replace(self._settings, ledger=ledger)
        theirs = replace(ledger, redis=_by_way_of(self.redis_proxy, self.redis.url))
        settings = replace(self._settings, ledger=theirs)
        (router,), *tiers = child_groups(settings, Machine(cores=2), is_private=True)
        groups = [[replace(router, name=f"{ROUTER}-{number}") for number in range(self._num_routers)], *tiers]
        wired = [[await self._wire(spec) for spec in group] for group in groups]
        self._supervisor = Supervisor(wired, lambda name, line: self._lines.append(f"{name}: {line}"), lambda _: 0.1)
        children = {child.spec.name: child for child in self._supervisor.children}
        for member in (*self.routers, *self.workers):
            member.child = children[member.name]
        self._supervising = asyncio.create_task(self._supervisor.run(self._stopping))
        # A connection for each request: one that is kept may be closed, by its server's end or age, just as it is used.
        connector = aiohttp.TCPConnector(force_close=True)
        self._http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        await self.ready()

    async def _wire(self, spec: ChildSpec) -> ChildSpec:
        """Each writes its log into a file and listens at one place for good. A worker is known by its proxy's."""
        log = self._logs / f"{spec.name}.log"
        argv = ("/bin/sh", "-c", _INTO_FILE, str(log), *spec.argv)
        spec = replace(spec, argv=argv, environ={**spec.environ, **_NO_RESERVE})
        if spec.name.startswith(ROUTER):
            router = Router(spec.name, None, next(self._ports))  # type: ignore[arg-type]
            self.routers.append(router)
            return replace(spec, environ={**spec.environ, **settings_environ([self._router_settings(router.port)])})
        port, http_port = next(self._ports), next(self._ports)
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

    def _router_settings(self, port: int) -> RouterSettings:
        drain_s = self._settings.worker.drain_timeout
        return replace(self._settings.router, host="127.0.0.1", port=port, drain_timeout=drain_s)

    def _kind_of(self, pid: int) -> str:
        if any(pid == router.child.pid for router in self.routers):
            return ROUTER
        return next((worker.role.value for worker in self.workers if worker.child.pid == pid), "unknown")

    async def stop(self) -> None:
        self.wake_all()
        self.fair_weather()
        self._stopping.set()
        if self._supervising is not None:
            await asyncio.wait([self._supervising])
        for proxy in self._proxies:
            await proxy.stop()
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

    def deaths(self) -> list[str]:
        """So far, each as its process's name and how it ended."""
        return [line.partition(" and is started again")[0] for line in self._lines if ": died (" in line]

    def of(self, role: Role) -> list[Worker]:
        return [worker for worker in self.workers if worker.role is role]

    @property
    def _proxies(self) -> list[Proxy]:
        return [self.redis_proxy, *(worker.proxy for worker in self.workers)]

    async def handoff_at(self, stage: Stage) -> HandoffRecord | None:
        """The hand-off that the ledger knows to be in that stage; None: there is none now."""
        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            found = [record for record in await ledger.open_handoffs() if record.stage is stage]
        assert len(found) <= 1, found
        return found[0] if found else None

    async def worker_of(self, epoch: Epoch | None) -> Worker:
        """The worker that is, as the ledger knows it, this incarnation."""
        (name,) = [record.worker for record in await self._on_ledger() if record.epoch == epoch]
        (worker,) = [worker for worker in self.workers if worker.name == name]
        return worker

    async def _on_ledger(self) -> list[WorkerRecord]:
        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            return await ledger.workers()

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

    def freeze(self, child: Child) -> None:
        assert child.pid is not None, f"{child.spec.name} is not running"
        os.kill(child.pid, signal.SIGSTOP)
        self._stopped.add(child.pid)

    def wake(self, child: Child) -> None:
        if child.pid is not None and child.pid in self._stopped:
            os.kill(child.pid, signal.SIGCONT)
            self._stopped.discard(child.pid)

    def wake_all(self) -> None:
        for child in self.processes:
            self.wake(child)

    def limit(self, child: Child, kind: int, most: int | None) -> None:
        """One of the system's limits on a living process: ``kind`` is of ``resource``; None lifts it."""
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                soft = resource.RLIM_INFINITY if most is None else most
                resource.prlimit(child.pid, kind, (soft, resource.RLIM_INFINITY))

    def fair_weather(self) -> None:
        for proxy in self._proxies:
            proxy.clear()

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

    async def ask(
        self, prompt: list[int], answer: Answer, *, router: int = 0, gate: Gate | None = None, **params: Any
    ) -> None:
        """Fills ``answer`` as tokens come; what goes wrong is in ``answer.error``."""
        fields = {"model": "tiny", "prompt": prompt, "stream": True, "return_token_ids": True, **params}
        body = json.dumps(fields).encode()
        data, headers = gate.pass_on(body) if gate else body, {"Content-Type": "application/json"}
        url = f"{self.routers[router].url}/v1/completions"
        try:
            async with self._http.post(url, data=data, headers=headers) as reply:
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
        """Until every router serves with every worker that there should be, and the ledger has them."""

        async def is_ready() -> bool:
            for worker in self.workers:
                async with self._http.get(f"http://127.0.0.1:{worker.http_port}/health") as reply:
                    if reply.status != 200:
                        return False
            if len(await self._on_ledger()) < len(self.workers):
                return False
            reports = [await self.readiness(number) for number in range(self._num_routers)]
            wanted = (len(self.of(Role.PREFILL)), len(self.of(Role.DECODE)))
            return all(
                report["status"] == "ready"
                and (report["details"]["prefill_workers"], report["details"]["decode_workers"]) == wanted
                for report in reports
            )

        await self._eventually(is_ready, READY_S, "the stack did not become ready")

    async def readiness(self, router: int = 0) -> dict[str, Any]:
        """What a router says of itself."""
        async with self._http.get(f"{self.routers[router].url}/ready") as reply:
            report: dict[str, Any] = await reply.json()
            return report

    async def settled(self) -> None:
        """Until every block of every pool is free or cached, and the ledger has no open hand-off."""
        await self._eventually(self.has_closed_handoffs, SETTLE_S, "hand-offs stay open on the ledger")
        await self.freed()

    async def freed(self, within_s: float = SETTLE_S) -> None:
        for worker in self.workers:
            await self._eventually(lambda worker=worker: self._is_free(worker), within_s, f"{worker.name} holds blocks")

    async def let_go(self, pids: Mapping[str, int], within_s: float) -> None:
        """Until the ledger has no open hand-off, and every worker that still is the process it was has all blocks free
        or cached."""

        async def is_let_go() -> bool:
            survivors = [worker for worker in self.workers if worker.child.pid == pids[worker.name]]
            frees = [await self._is_free(worker) for worker in survivors]
            return all(frees) and await self.has_closed_handoffs()

        await self._eventually(is_let_go, within_s, "what was held is let go too late")

    async def recorded(self) -> None:
        """Until the ledger has every worker, and what each has cached."""
        await self._eventually(self._is_recorded, SETTLE_S, "workers or inventories are not on the ledger")

    async def _is_recorded(self) -> bool:
        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            epochs = [record.epoch for record in await ledger.workers()]
            inventories = [await ledger.snapshot(epoch) for epoch in epochs]
        return len(epochs) == len(self.workers) and all(found and found.hashes for found in inventories)

    async def has_closed_handoffs(self) -> bool:
        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            return not await ledger.open_handoffs()

    async def _is_free(self, worker: Worker) -> bool:
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
        page = await self.metrics(worker.http_port)
        return all(total(page, name) == 0 for name in names)

    async def metrics(self, port: int) -> str:
        async with self._http.get(f"http://127.0.0.1:{port}/metrics") as reply:
            return await reply.text()

    async def router_metrics(self, router: int = 0) -> str:
        return await self.metrics(self.routers[router].port)

    async def computed(self, workers: Iterable[Worker]) -> int:
        """Prompt tokens that they have computed, since they started."""
        pages = [await self.metrics(worker.http_port) for worker in workers]
        return int(sum(total(page, "tandem_computed_prompt_tokens_total") for page in pages))

    async def transports_used(self) -> set[str]:
        """Over which ways KV has travelled, between the workers as they are now."""
        pages = [await self.metrics(worker.http_port) for worker in self.workers]
        return set(re.findall(r'^tandem_kv_transfer_bytes_total\{.*transport="(\w+)"', "\n".join(pages), re.MULTILINE))

    def log_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._logs.iterdir())

    async def recoveries(self, router: int = 0) -> Counter[str]:
        """How often a router has done what, since it started."""
        page = await self.router_metrics(router)
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
            except (aiohttp.ClientError, OSError, LedgerAway):
                pass
            assert time.monotonic() < deadline, "\n".join([otherwise, *self._last_words()])
            await asyncio.sleep(0.1)

    def _last_words(self) -> list[str]:
        logs = (path.read_text(errors="replace").splitlines()[-30:] for path in sorted(self._logs.iterdir()))
        return [*self._lines[-20:], *itertools.chain.from_iterable(logs)]


def _by_way_of(proxy: Proxy, url: str) -> str:
    return re.sub(r":\d+/", f":{proxy.port}/", url)


def total(page: str, name: str) -> float:
    """The sum over all labels of one metric."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(float(value) for value in values)
