"""What each fault of the matrix does, and how it is undone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal

from redis.asyncio import Redis

from proto.control import Role
from tests.support.answer import Answer
from tests.support.arena import KINDS, ROUTER
from tests.support.fault_stages import PREFILL, SHM, Scene
from tests.support.redis import clear_disk, exhaust_memory, fill_disk, give_memory

_DELAY_S = 0.02
"""Of each piece, on a slow way."""
_REDIS_DELAY_S = 0.4
"""A heartbeat takes twice as long, and is in time all the same."""
QUICK_S = 20.0
SLOW_S = 60.0
"""Silence is noticed by the keepalive of the connections, or by a stage's deadline."""
_GIVEN_UP_S = 11.0
"""Longer than the keepalive of the connections."""
_FREED_S = 8.0
"""What a router held is let go five seconds after its connections, if not before."""
_RECORDS_GONE_S = 10.0
"""Longer than a worker's record lasts on the ledger."""


class Fault:
    within_s = QUICK_S
    """From its end on, where it ends by itself."""
    kills_router = False
    is_shortage = False
    """Nobody is lost: while it lasts, new requests are answered, too."""

    async def strike(self, scene: Scene) -> None: ...

    async def outlast(self, scene: Scene) -> None:
        """Meanwhile what was held up goes on."""

    async def undo(self, scene: Scene) -> None:
        """Once the client has its answer."""

    def verify(self, scene: Scene) -> None:
        """When all is over: that it has struck at all."""


class Kill(Fault):
    def __init__(self, sides: str) -> None:
        self._sides = sides

    async def strike(self, scene: Scene) -> None:
        for side in self._sides:
            scene.arena.kill(scene.worker(side))


class Freeze(Fault):
    """SIGSTOP; once the client has everything, SIGCONT: it wakes up and believes that it owns its blocks."""

    within_s = SLOW_S

    def __init__(self, side: str) -> None:
        self._side = side

    async def strike(self, scene: Scene) -> None:
        victim = scene.worker(self._side)
        scene.frozen.add(victim.name)
        scene.arena.freeze(victim.child)

    async def undo(self, scene: Scene) -> None:
        if self._side == "D" and scene.arena.transport == SHM:
            await _use_all_blocks(scene)
        scene.arena.wake(scene.worker(self._side).child)


async def _use_all_blocks(scene: Scene) -> None:
    """Other prompts take the place of what the stopped decode worker still means to copy from P's memory."""
    before = await scene.arena.computed([scene.p])
    while await scene.arena.computed([scene.p]) - before < scene.arena.num_pool_tokens:
        answers = [Answer() for _ in scene.arena.of(Role.PREFILL)]
        async with asyncio.timeout(SLOW_S), asyncio.TaskGroup() as group:
            for number, answer in enumerate(answers):
                other = f"another prompt {os.urandom(4).hex()} {number}"
                group.create_task(scene.arena.ask(scene.prompt, answer, cache_salt=other, max_tokens=2))
        assert not any(answer.error for answer in answers), answers


class Network(Fault):
    """The way from one kind of client to the request's worker of one tier."""

    def __init__(self, client: str, server: str, within_s: float = QUICK_S, **weather: float | bool) -> None:
        self._client, self._server, self.within_s, self._weather = client, server, within_s, weather

    async def strike(self, scene: Scene) -> None:
        scene.worker(self._server).proxy.set(self._client, **self._weather)


class Flip(Fault):
    """One bit in each of the next payload frames."""

    async def strike(self, scene: Scene) -> None:
        self._weather = scene.d.proxy.weather(PREFILL)
        scene.d.proxy.set(PREFILL, num_flips=3)

    async def undo(self, scene: Scene) -> None:
        self._num_flipped = self._weather.num_flipped

    def verify(self, scene: Scene) -> None:
        assert self._num_flipped > 0, "no bit was flipped"


class OutOfMemory(Fault):
    """The system gives a worker no more memory: what it has must do."""

    within_s = SLOW_S
    _LITTLE = 1 << 20

    def __init__(self, side: str) -> None:
        self._side = side

    async def strike(self, scene: Scene) -> None:
        victim = scene.worker(self._side)
        self._pid = victim.pid
        scene.arena.limit(victim.child, resource.RLIMIT_DATA, self._LITTLE)

    async def undo(self, scene: Scene) -> None:
        victim = scene.worker(self._side)
        if victim.child.pid == self._pid:
            scene.arena.limit(victim.child, resource.RLIMIT_DATA, None)

    def verify(self, scene: Scene) -> None:
        lives = scene.worker(self._side).child.pid == self._pid
        scene.notes.append(f"{self._side} {'lives' if lives else 'ends and comes back'}")


class DiskFull(Fault):
    """No file of any process grows any more: logs are not written; Redis, which cannot save, refuses every write."""

    is_shortage = True

    async def strike(self, scene: Scene) -> None:
        self._victims = scene.arena.processes
        for child in self._victims:
            scene.arena.limit(child, resource.RLIMIT_FSIZE, 0)
        await fill_disk(scene.arena.redis)
        self._log_bytes = scene.arena.log_bytes()
        await _wait_until_records_are_gone(scene)

    async def undo(self, scene: Scene) -> None:
        assert scene.arena.log_bytes() == self._log_bytes, "the disk was not full"
        for child in self._victims:
            scene.arena.limit(child, resource.RLIMIT_FSIZE, None)
        await clear_disk(scene.arena.redis)

    def verify(self, scene: Scene) -> None:
        assert scene.arena.log_bytes() > self._log_bytes, "nobody has anything to log"


class RedisOutOfMemory(Fault):
    is_shortage = True

    async def strike(self, scene: Scene) -> None:
        await exhaust_memory(scene.arena.redis)
        await _wait_until_records_are_gone(scene)

    async def undo(self, scene: Scene) -> None:
        await give_memory(scene.arena.redis)


async def _wait_until_records_are_gone(scene: Scene) -> None:
    """No heartbeat is written any more: as far as Redis knows, nobody lives."""
    async with asyncio.timeout(_RECORDS_GONE_S), Redis.from_url(scene.arena.redis.url) as redis:
        while [key async for key in redis.scan_iter("*:worker:*")]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class RedisDies(Fault):
    async def strike(self, scene: Scene) -> None:
        await scene.arena.redis.kill()

    async def undo(self, scene: Scene) -> None:
        await scene.arena.redis.start()


class RedisFlushed(Fault):
    async def strike(self, scene: Scene) -> None:
        async with Redis.from_url(scene.arena.redis.url) as redis:
            await redis.flushall()


class RedisFrozen(Fault):
    async def strike(self, scene: Scene) -> None:
        assert scene.arena.redis.pid is not None
        os.kill(scene.arena.redis.pid, signal.SIGSTOP)

    async def undo(self, scene: Scene) -> None:
        assert scene.arena.redis.pid is not None
        os.kill(scene.arena.redis.pid, signal.SIGCONT)


class RedisNetwork(Fault):
    """Everybody's way to Redis."""

    is_shortage = True

    def __init__(self, within_s: float = QUICK_S, *, is_lost: bool, **weather: float | bool) -> None:
        self.within_s, self._is_lost, self._weather = within_s, is_lost, weather

    async def strike(self, scene: Scene) -> None:
        for kind in KINDS:
            scene.arena.redis_proxy.set(kind, **self._weather)
        if self._is_lost:
            await _wait_until_records_are_gone(scene)


class RouterFrozen(Fault):
    """For longer than the others' patience: its connections are given up, and what it held is freed meanwhile."""

    within_s = SLOW_S

    async def strike(self, scene: Scene) -> None:
        scene.arena.freeze(scene.arena.routers[0].child)

    async def outlast(self, scene: Scene) -> None:
        await asyncio.sleep(_GIVEN_UP_S)
        await scene.arena.freed(within_s=_FREED_S)
        scene.arena.wake(scene.arena.routers[0].child)


class RouterDies(Fault):
    kills_router = True

    async def strike(self, scene: Scene) -> None:
        pid = scene.arena.routers[0].child.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "P killed": Kill("P"),
    "D killed": Kill("D"),
    "P and D killed": Kill("PD"),
    "P stopped, wakes up later": Freeze("P"),
    "D stopped, wakes up later": Freeze("D"),
    "P-D cut": Network(PREFILL, "D", is_cut=True),
    "P-D silent": Network(PREFILL, "D", SLOW_S, is_silent=True),
    "P-D slow": Network(PREFILL, "D", SLOW_S, delay_s=_DELAY_S),
    "router-P slow": Network(ROUTER, "P", SLOW_S, delay_s=_DELAY_S),
    "router-D slow": Network(ROUTER, "D", SLOW_S, delay_s=_DELAY_S),
    "router-P cut": Network(ROUTER, "P", is_cut=True),
    "router-D cut": Network(ROUTER, "D", is_cut=True),
    "router-P silent": Network(ROUTER, "P", SLOW_S, is_silent=True),
    "router-D silent": Network(ROUTER, "D", SLOW_S, is_silent=True),
    "payload bits flipped": Flip(),
    "P out of memory": OutOfMemory("P"),
    "D out of memory": OutOfMemory("D"),
    "Redis cut": RedisNetwork(is_lost=True, is_cut=True),
    "Redis silent": RedisNetwork(is_lost=True, is_silent=True),
    "Redis slow": RedisNetwork(SLOW_S, is_lost=False, delay_s=_REDIS_DELAY_S),
    "Redis killed, back empty": RedisDies(),
    "Redis flushed": RedisFlushed(),
    "Redis stopped": RedisFrozen(),
    "Redis out of memory": RedisOutOfMemory(),
    "disk full": DiskFull(),
    "router stopped, wakes up later": RouterFrozen(),
    "router killed": RouterDies(),
}
