"""``tandem bench chaos``: a whole stack of our own, and the means to harm it. Load and verdicts are ``bench.chaos``'.

Answers are compared token by token, so the model runs in float32 unless ``--dtype`` says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import RedisError

from bench.chaos.report import Report
from bench.chaos.run import run
from bench.chaos.settings import ChaosSettings
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.transports import AUTO, GRPC
from proto.errors import SettingsError, Unavailable
from proto.settings import LedgerSettings
from service import logs
from service.process import run_service
from tandem.builtin_model import NOTICE, with_some_model
from tandem.chaos_network import Network
from tandem.local import ROUTER, LocalStack, Ready, StackSettings, print_line
from tandem.machine import Machine, this_machine
from tandem.options import SERVE, Resolved, build_parser, resolve
from tandem.parser import Parser
from tandem.supervisor import ChildSpec, Say

REDIS = "redis"
_RESTART_DELAY_S = 0.2
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_USAGE = re.compile(r"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_TIERS = ("prefill", "decode")


class StackInReach:
    """A ``bench.chaos.faults.Stack`` whose processes are our children, reached through ``network``. Its Redis is the
    stack's private one."""

    def __init__(self, stack: LocalStack, network: Network) -> None:
        self._stack = stack
        self.network = network
        self._children = {child.spec.name: child for child in stack.supervisor.children}

    @property
    def base_url(self) -> str:
        return self._stack.url.removesuffix("/v1")

    def members(self, tier: str) -> Sequence[str]:
        if tier == REDIS:
            return [] if self._stack.redis_pid is None else [REDIS]
        return [name for name, child in self._children.items() if name.startswith(tier) and child.pid is not None]

    def kill(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)

    def restart(self, name: str) -> None:
        self._signal(name, signal.SIGTERM)

    def stop(self, name: str) -> None:
        self._signal(name, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    async def flush(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            async with Redis.from_url(_url(self._stack.ledger)) as redis:
                await redis.flushall()

    async def is_whole(self, tier: str = "") -> bool:
        details = await self._details()
        wanted = [tier] if tier else _TIERS
        names = [name for name in self._children if name != ROUTER]
        return details is not None and all(
            details[f"{each}_workers"] == sum(name.startswith(each) for name in names) for each in wanted
        )

    async def leftovers(self) -> Mapping[str, int]:
        details = await self._details()
        left = {"requests in the router": 1 if details is None else details["inflight_requests"]}
        async with RedisLedger.from_settings(self._stack.ledger) as ledger:
            try:
                workers = await ledger.workers()
                left["hand-offs open on the ledger"] = len(await ledger.open_handoffs())
            except Unavailable:
                return {"the ledger cannot be reached": 1}
        for worker in workers:
            page = await self._get(f"http://{worker.http_address}/metrics")
            usage = None if page is None else _USAGE.search(page)
            share = 1.0 if usage is None else float(usage[1])
            left[f"blocks of {worker.worker}"] = round(share * worker.num_blocks)
        return {where: count for where, count in left.items() if count}

    def _signal(self, name: str, number: signal.Signals) -> None:
        if name != REDIS:
            self._children[name].signal(number)
        elif (pid := self._stack.redis_pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def _details(self) -> Mapping[str, int] | None:
        """What the router says of itself; None while it says nothing."""
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            try:
                async with session.get(f"{self.base_url}/ready") as reply:
                    details: Mapping[str, int] = (await reply.json())["details"]
                    return details
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None

    async def _get(self, url: str) -> str | None:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            try:
                async with session.get(url) as reply:
                    return await reply.text()
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None


class Chaos:
    """The stack as a service, harmed once it is ready. It ends with the report, which ``report`` then holds."""

    def __init__(
        self,
        settings: StackSettings,
        machine: Machine,
        chaos: ChaosSettings,
        *,
        say: Say,
        note: Callable[[str], object],
    ) -> None:
        self._settings = chaos
        self._note = note
        self._ready = asyncio.Event()
        local = settings.local
        tiers = {"prefill": local.prefill, "decode": local.decode}
        self._network = Network([f"{tier}-{n}" for tier, num in tiers.items() for n in range(num)], self._tier_of)
        self._has_both = settings.worker.transports == (AUTO,)
        self._stack = LocalStack(
            settings,
            machine,
            say=say,
            on_ready=self._became_ready,
            delay_s=lambda num_deaths: _RESTART_DELAY_S,
            wire=self._wire,
        )
        self.report: Report | None = None

    async def start(self) -> None:
        await self._network.start()
        await self._stack.start()

    async def run(self) -> None:
        serving = asyncio.ensure_future(self._stack.run())
        harming = asyncio.ensure_future(self._harm())
        try:
            await asyncio.wait([serving, harming], return_when=asyncio.FIRST_COMPLETED)
            if not harming.done():
                serving.result()
            self.report = await harming
        finally:
            for task in (serving, harming):
                task.cancel()
            await asyncio.wait([serving, harming])

    async def stop(self) -> None:
        await self._stack.stop()
        await self._network.stop()

    async def _harm(self) -> Report:
        await self._ready.wait()
        return await run(self._settings, StackInReach(self._stack, self._network), self._note)

    def _wire(self, spec: ChildSpec) -> ChildSpec:
        """Bits can be flipped only where payloads pass the network: so where all transports are allowed, every other
        prefill worker has gRPC alone, and the rest the best way."""
        spec = self._network.wired(spec)
        tier, _, number = spec.name.partition("-")
        if not self._has_both or tier != "prefill" or int(number) % 2:
            return spec
        return replace(spec, environ={**spec.environ, "TANDEM_TRANSPORTS": GRPC})

    def _tier_of(self, pid: int) -> str:
        pids = {child.pid: child.spec.name for child in self._stack.supervisor.children}
        return pids.get(pid, "unknown").partition("-")[0]

    def _became_ready(self, ready: Ready) -> None:
        self._ready.set()


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Takes the flags of ``tandem serve`` and its own; 0 where nothing was wrong, lost or left behind.

    Raises SettingsError.
    """
    given = _parser().read(argv)
    resolved = resolve(SERVE, given, environ)
    settings = stack_settings(resolved)
    logs.setup(settings.log)
    service = Chaos(settings, this_machine(), chaos_settings(given), say=print_line, note=_note)
    status = run_service(service, drain_timeout=settings.stop_timeout_s)
    if service.report is None:
        return status or 1
    print(service.report.text(), flush=True)
    return status or (0 if service.report.is_clean else 1)


def stack_settings(resolved: Resolved) -> StackSettings:
    """Two workers of each tier, float32, all prompts handed over, no secrets: where nothing else is said."""
    wanted = resolved.engine()
    if wanted.model.model is None:
        _note(NOTICE)
    engine = with_some_model(wanted)
    if "model.dtype" not in resolved.given:
        engine = replace(engine, model=replace(engine.model, dtype="float32"))
    settings = StackSettings.of(resolved, engine)
    local, router = settings.local, settings.router
    if router.api_key or router.api_key_file or router.ssl_certfile or settings.ledger.redis:
        raise SettingsError("This stack is private: it takes no keys, no certificate, and no Redis but its own.")
    local = replace(
        local,
        prefill=local.prefill if "local.prefill" in resolved.given else 2,
        decode=local.decode if "local.decode" in resolved.given else 2,
    )
    if "router.disagg_threshold" not in resolved.given:
        router = replace(router, disagg_threshold=0)
    return replace(settings, local=local, router=replace(router, host="127.0.0.1", port=0))


def chaos_settings(given: argparse.Namespace) -> ChaosSettings:
    if min(given.minutes, given.fault_every, given.concurrency, given.questions) <= 0:
        raise SettingsError("--minutes, --fault-every, --concurrency and --questions must be above 0.")
    return ChaosSettings(
        seed=given.chaos_seed,
        storm_s=60.0 * given.minutes,
        fault_every_s=given.fault_every,
        concurrency=given.concurrency,
        num_questions=given.questions,
    )


def _parser() -> Parser:
    about = (
        "Runs all tiers on this machine, harms them and the network between them by a seeded schedule under a mixed "
        "load, and compares every answer with the one given in peace. Exits with 1 where one was wrong or lost, or "
        "something is left behind. With --transports auto, every other prefill worker hands over by gRPC alone, where "
        "bits can be flipped, and the others by shared memory."
    )
    defaults = ChaosSettings()
    parser = build_parser(SERVE, "tandem bench chaos", about)
    add = parser.add_argument_group("chaos", "What is done to the stack.").add_argument
    add("--minutes", type=float, default=defaults.storm_s / 60.0, metavar="M", help="of faults (default: 5)")
    add("--fault-every", type=float, default=defaults.fault_every_s, metavar="S", help="mean seconds (default: 4)")
    add("--concurrency", type=int, default=defaults.concurrency, metavar="N", help="clients (default: 8)")
    add("--questions", type=int, default=defaults.num_questions, metavar="N", help="different ones (default: 48)")
    add("--chaos-seed", type=int, default=defaults.seed, metavar="N", help="of questions and faults (default: 0)")
    return parser


def _url(ledger: LedgerSettings) -> str:
    assert ledger.redis is not None, "a started stack has a Redis"
    return ledger.redis


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
