"""Harms a stack by a schedule, one fault at a time and tier by tier. Knows no requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.chaos.faults import Fault, Stack

_LOOK_EVERY_S = 0.1
_EXCLUSIVE = "decode"


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was done, to whom, and when (``time.monotonic``)."""

    fault: Fault
    name: str
    at_s: float

    def describe(self) -> str:
        kind = self.fault.kind
        return f"{kind.verb} {self.name}" + (f" for {self.fault.for_s:.1f} s" if kind.verb == "stop" else "")


class Storm:
    """``run`` until cancelled; ``calm`` then undoes what is still being done.

    A decode worker is harmed only while the router has all of them, so that with two there is always one to go on:
    a stack with none left has nothing to promise. Prefill workers may all be away.
    """

    def __init__(self, stack: Stack, note: Callable[[str], object]) -> None:
        self._stack = stack
        self._note = note
        self._stopped: dict[str, asyncio.Task[None]] = {}
        self.done: list[Done] = []

    async def run(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(fault.after_s)
            tier = fault.kind.tier
            if tier == _EXCLUSIVE:
                await self._until_whole(tier)
            members = [name for name in self._stack.members(tier) if name not in self._stopped]
            if members:
                await self._do(fault, members[fault.number % len(members)])

    async def calm(self) -> None:
        """Everything that is stopped goes on. May be called twice."""
        for name, task in list(self._stopped.items()):
            task.cancel()
            await asyncio.wait([task])
            self._go_on(name)

    async def _until_whole(self, tier: str) -> None:
        """The router tells when it is asked, and not before: so this asks until it is so."""
        while True:
            if await self._is_whole(tier):
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _is_whole(self, tier: str) -> bool:
        is_stopped = any(name in self._stopped for name in self._stack.members(tier))
        return not is_stopped and await self._stack.is_whole(tier)

    async def _do(self, fault: Fault, name: str) -> None:
        done = Done(fault, name, time.monotonic())
        self.done.append(done)
        self._note(done.describe())
        match fault.kind.verb:
            case "kill":
                self._stack.kill(name)
            case "restart":
                self._stack.restart(name)
            case "flush":
                await self._stack.flush()
            case _:
                self._stack.stop(name)
                self._stopped[name] = asyncio.create_task(self._go_on_after(name, fault.for_s))

    async def _go_on_after(self, name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._go_on(name)

    def _go_on(self, name: str) -> None:
        if self._stopped.pop(name, None) is not None:
            self._stack.go_on(name)
