"""All tiers on this machine: a private Redis, the router, and the workers as processes of their own.

    start   Redis ─▶ prefill, decode, router together ─▶ workers on the ledger ─▶ router ready
    stop    router (drains) ─▶ prefill ─▶ decode ─▶ Redis

Every child gets its settings by environment, secrets included, so none is in an argument list. Knows how the tiers are
started and watched; knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from engine.checkpoint import local_folder
from kvtransfer.ledger.records import InventoryChange, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.watcher import LedgerWatcher
from proto.errors import SettingsError, SetupError
from proto.ids import Epoch
from proto.settings import (
    EngineSettings,
    LedgerSettings,
    LocalSettings,
    LogSettings,
    RouterSettings,
    RpcSettings,
    WorkerSettings,
)
from router.auth import read_keys
from service.address import is_host
from service.process import child_environment
from tandem.local_redis import LocalRedis, keep_running
from tandem.machine import Machine, shares
from tandem.options import Resolved, settings_environ, without_settings
from tandem.supervisor import Child, ChildSpec, Say, Supervisor, restart_delay_s

ROUTER = "router"
_WORKER_ID = "TANDEM_WORKER_ID"
_STOP_SLACK_S = 22.0
"""Beyond its drain timeout. A process that is stuck ends by itself before, and says so (``service.process``)."""
_PROBE_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSettings:
    """Everything ``tandem serve`` decides. ``engine`` names a model."""

    local: LocalSettings
    engine: EngineSettings
    ledger: LedgerSettings
    worker: WorkerSettings
    router: RouterSettings
    log: LogSettings
    rpc: RpcSettings

    @classmethod
    def of(cls, resolved: Resolved, engine: EngineSettings) -> StackSettings:
        return cls(
            local=resolved.get(LocalSettings),
            engine=engine,
            ledger=resolved.get(LedgerSettings),
            worker=resolved.get(WorkerSettings),
            router=resolved.get(RouterSettings),
            log=resolved.get(LogSettings),
            rpc=resolved.get(RpcSettings),
        )

    @property
    def stop_timeout_s(self) -> float:
        """How long stopping everything in order may take."""
        return 3 * (self.worker.drain_timeout + _STOP_SLACK_S) + _STOP_SLACK_S


@dataclass(frozen=True, slots=True)
class Ready:
    """What is up. ``url`` is the base URL for OpenAI clients."""

    url: str
    workers: tuple[WorkerRecord, ...]

    @property
    def model(self) -> str:
        return self.workers[0].model

    def describe(self) -> str:
        width = max(len(record.worker) for record in self.workers)
        lines = [f"Ready: {self.url}  (model {self.model})"]
        for record in self.workers:
            tokens = record.num_blocks * record.block_size
            page = f"  http://{record.http_address}/metrics" if record.http_address else ""
            lines.append(f"  {record.worker:<{width}}  {record.address}  {tokens:,} tokens of KV cache{page}")
        return "\n".join([*lines, "Ctrl-C stops everything."])


class LocalStack:
    """A ``service.process.Service``. ``say`` shows the children's lines; ``on_ready`` is called once, by ``run``.

    ``wire`` may change what a child is told, so that something stands between it and the others.
    """

    def __init__(
        self,
        settings: StackSettings,
        machine: Machine,
        *,
        say: Say,
        on_ready: Callable[[Ready], None],
        delay_s: Callable[[int], float] = restart_delay_s,
        wire: Callable[[ChildSpec], ChildSpec] = lambda spec: spec,
    ) -> None:
        router = settings.router
        self._settings = replace(settings, router=replace(router, port=router.port or _free_port(router.host)))
        self._machine = machine
        self._say = say
        self._on_ready = on_ready
        self._delay_s = delay_s
        self._wire = wire
        self._redis = LocalRedis() if settings.ledger.redis is None else None
        self._redis_keeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._supervisor: Supervisor | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def supervisor(self) -> Supervisor:
        assert self._supervisor is not None, "start() comes first"
        return self._supervisor

    @property
    def ledger(self) -> LedgerSettings:
        """Where the tiers meet; known once started."""
        return self._settings.ledger

    @property
    def redis_pid(self) -> int | None:
        """The private Redis' process; None where there is none, now or at all."""
        return None if self._redis is None else self._redis.pid

    @property
    def url(self) -> str:
        router = self._settings.router
        scheme = "https" if router.ssl_certfile else "http"
        host = "127.0.0.1" if router.host in ("", "0.0.0.0", "::") else router.host
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{router.port}{router.root_path}/v1"

    async def start(self) -> None:
        """Starts every process and returns at once after: they load on their own time. Raises SetupError."""
        self._check()
        ledger = self._settings.ledger
        if self._redis is not None:
            await self._redis.start()
            keeping = keep_running(self._redis, self._say, self._delay_s)
            self._redis_keeper = asyncio.create_task(keeping, name="redis")
            ledger = replace(ledger, redis=self._redis.url)
        self._settings = replace(self._settings, ledger=ledger)
        wanted = child_groups(self._settings, self._machine, is_private=self._redis is not None)
        groups = [[self._wire(spec) for spec in group] for group in wanted]
        self._supervisor = Supervisor(groups, self._say, self._delay_s)
        self._supervising = asyncio.create_task(self._supervisor.run(self._stopping), name="supervisor")

    def _check(self) -> None:
        """What would fail in a child seconds later, told at once and in one line. Raises SetupError."""
        router, model = self._settings.router, self._settings.engine.model
        _check_advertised(self._settings)
        _free_port(router.host, router.port)
        for name in (model.model, model.tokenizer):
            if name:
                local_folder(name)

    async def run(self) -> None:
        """Waits until all are ready, tells, and goes on until a child fails for good: raises ChildFailed then."""
        assert self._supervising is not None, "start() comes first"
        becoming_ready = asyncio.create_task(self._become_ready())
        try:
            await asyncio.wait([self._supervising, becoming_ready], return_when=asyncio.FIRST_COMPLETED)
            if becoming_ready.done():
                self._on_ready(becoming_ready.result())
            await asyncio.shield(self._supervising)
        finally:
            becoming_ready.cancel()
            await asyncio.wait([becoming_ready])

    async def stop(self) -> None:
        """Ends all in order. Also when ``start`` was cut short; may be called twice."""
        self._stopping.set()
        try:
            if self._supervising is not None:
                # What failed has been told, by run() or by the child: nothing is to be raised again.
                await asyncio.gather(self._supervising, return_exceptions=True)
        finally:
            if self._redis_keeper is not None:
                self._redis_keeper.cancel()
                await asyncio.wait([self._redis_keeper])
            if self._redis is not None:
                await self._redis.stop()

    async def _become_ready(self) -> Ready:
        workers = await self._workers_joined()
        await self._router_ready()
        return Ready(self.url, workers)

    async def _workers_joined(self) -> tuple[WorkerRecord, ...]:
        """Waits until every worker of ours has been on the ledger at once."""
        names = {
            child.spec.environ[_WORKER_ID]: child.spec.name for child in self.supervisor.children if _is_worker(child)
        }
        found: dict[str, WorkerRecord] = {}
        complete = asyncio.Event()

        def changed(records: list[WorkerRecord]) -> None:
            found.clear()
            found.update({names[record.worker]: record for record in records if record.worker in names})
            if len(found) == len(names):
                complete.set()

        async with RedisLedger.from_settings(self._settings.ledger) as ledger:
            watcher = LedgerWatcher(ledger, workers_changed=changed, inventory_changed=_ignore)
            watcher.start()
            try:
                await complete.wait()
            finally:
                await watcher.close()
        return tuple(found[name] for name in names.values())

    async def _router_ready(self) -> None:
        """Until the router serves with all of our workers. HTTP has no way to wait, so this asks until it is so."""
        import aiohttp

        url = self.url.removesuffix("/v1") + "/ready"
        key = next(iter(read_keys(self._settings.router)), None)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(url, ssl=False) as reply:
                        if reply.status == 200 and self._knows_all((await reply.json())["details"]):
                            return
                await asyncio.sleep(_PROBE_PAUSE_S)

    def _knows_all(self, details: Mapping[str, int]) -> bool:
        local = self._settings.local
        return details["prefill_workers"] >= local.prefill and details["decode_workers"] >= local.decode


def child_groups(settings: StackSettings, machine: Machine, *, is_private: bool) -> list[list[ChildSpec]]:
    """Router, prefill workers, decode workers: the order in which they are stopped.

    ``is_private``: the ledger is this stack's alone, so workers listen on loopback and have plain names. Otherwise they
    can be reached from other machines, and their names are unique there.
    """
    num_prefill, num_decode = settings.local.prefill, settings.local.decode
    parts = shares(machine, settings.engine, num_prefill + num_decode)
    suffix = "" if is_private else f".{socket.gethostname()}-{secrets.token_hex(2)}"
    base = without_settings(child_environment())
    shared = settings_environ([settings.ledger, settings.log, settings.rpc])

    def worker(role: str, number: int, index: int) -> ChildSpec:
        name = f"{role}-{number}"
        mine = replace(settings.worker, worker_id=name + suffix, http_port=0)
        if is_private:
            mine = replace(mine, host="127.0.0.1", advertise="127.0.0.1")
        engine = parts[index].engine
        own = settings_environ([engine.model, engine.cache, engine.scheduler, mine])
        return _child(role, name, {**base, **shared, **own, **parts[index].environ}, settings)

    router = replace(settings.router, drain_timeout=settings.worker.drain_timeout)
    router_environ = {
        **base,
        **shared,
        **settings_environ([router, settings.engine.model, settings.engine.cache]),
    }
    return [
        [_child(ROUTER, ROUTER, router_environ, settings)],
        [worker("prefill", number, number) for number in range(num_prefill)],
        [worker("decode", number, num_prefill + number) for number in range(num_decode)],
    ]


def _check_advertised(settings: StackSettings) -> None:
    told = settings.worker.advertise
    if told is None:
        return
    if settings.ledger.redis is None:
        raise SettingsError("--advertise is for workers that other machines reach: give --redis URL, or leave it out")
    if not is_host(told):
        raise SettingsError(f"--advertise takes a host alone here, as each worker has a port of its own; got {told!r}")


def _is_worker(child: Child) -> bool:
    return child.spec.name != ROUTER


def _child(role: str, name: str, environ: Mapping[str, str], settings: StackSettings) -> ChildSpec:
    return ChildSpec(
        name=name,
        argv=(sys.executable, "-m", "tandem", role),
        environ={**environ, "PYTHONUNBUFFERED": "1"},
        stop_timeout_s=settings.worker.drain_timeout + _STOP_SLACK_S,
    )


def _free_port(host: str, port: int = 0) -> int:
    """A port that was free a moment ago: the children are told a number, so that the URL is known from the start.

    Raises SetupError when ``port`` is not free, or ``host`` no address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        found: int = probe.getsockname()[1]
        return found


def _ignore(epoch: Epoch, change: InventoryChange) -> None:
    """Who caches what is the router's business."""


def print_line(name: str, line: str) -> None:
    """A child's line on stderr behind its name; a line of JSON gets the name as its first field instead.

    What cannot be written (a full disk, a pipe that nobody reads any more) is lost: the children are worth more.
    """
    text = f'{{"process": "{name}", {line[1:]}' if line.startswith('{"') else f"{name:<10} | {line}"
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_ready(ready: Ready) -> None:
    """On stdout; what cannot be written is lost, here too, and so is all that comes after it."""
    try:
        print(ready.describe(), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
