"""Harms a stack by a schedule, one fault at a time and tier by tier. Knows no requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.chaos.faults import Fault, FaultKind, Stack

_LOOK_EVERY_S = 0.1
_EXCLUSIVE = "decode"


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was done, to whom, and when (``time.monotonic``)."""

    fault: Fault
    name: str
    at_s: float

    def describe(self) -> str:
        fault = self.fault
        where = f"{fault.kind.client}-{self.name}" if fault.kind.client else self.name
        if fault.kind is FaultKind.FLIP:
            return f"flip {where} × {fault.num_flips}"
        return f"{fault.kind.verb} {where}" + (f" for {fault.for_s:.1f} s" if fault.lasts else "")


class Storm:
    """``run`` until cancelled; ``calm`` then undoes what is still being done.

    A decode worker is harmed only while the router has all of them, and no fault lasts at any, so that with two there
    is always one to go on: a stack with none left has nothing to promise. One that cannot be reached, by the router or
    by prefill workers, counts as harmed; one whose blocks arrive damaged does not. Prefill workers may all be away.
    """

    def __init__(self, stack: Stack, note: Callable[[str], object]) -> None:
        self._stack = stack
        self._note = note
        self._lasting: dict[str, tuple[Fault, asyncio.Task[None]]] = {}
        self.done: list[Done] = []

    async def run(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(fault.after_s)
            tier = fault.kind.tier
            if tier == _EXCLUSIVE and fault.kind is not FaultKind.FLIP:
                await self._until_whole(tier)
            members = [name for name in self._stack.members(tier) if name not in self._lasting]
            if members:
                await self._do(fault, members[fault.number % len(members)])

    async def calm(self) -> None:
        """Everything that is stopped goes on, and every connection is well. May be called twice."""
        for name, (_, task) in list(self._lasting.items()):
            task.cancel()
            await asyncio.wait([task])
            self._end(name)
        for done in self.done:
            if done.fault.kind is FaultKind.FLIP:
                self._stack.network.flip(done.fault.kind.client, done.name, 0)

    async def _until_whole(self, tier: str) -> None:
        """The router tells when it is asked, and not before: so this asks until it is so."""
        while True:
            if await self._is_whole(tier):
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _is_whole(self, tier: str) -> bool:
        is_harmed = any(fault.kind.tier == tier for fault, _ in self._lasting.values())
        return not is_harmed and await self._stack.is_whole(tier)

    async def _do(self, fault: Fault, name: str) -> None:
        done = Done(fault, name, time.monotonic())
        self.done.append(done)
        self._note(done.describe())
        await self._begin(fault, name)
        if fault.lasts:
            self._lasting[name] = fault, asyncio.create_task(self._end_after(name, fault.for_s))

    async def _begin(self, fault: Fault, name: str) -> None:
        network, client = self._stack.network, fault.kind.client
        match fault.kind.verb:
            case "kill":
                self._stack.kill(name)
            case "restart":
                self._stack.restart(name)
            case "flush":
                await self._stack.flush()
            case "flip":
                network.flip(client, name, fault.num_flips)
            case "stop":
                self._stack.stop(name)
            case "cut":
                network.cut(client, name)
            case "silence":
                network.silence(client, name)
            case "slow":
                network.slow(client, name)

    async def _end_after(self, name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._end(name)

    def _end(self, name: str) -> None:
        if (lasting := self._lasting.pop(name, None)) is None:
            return
        kind = lasting[0].kind
        if kind.client:
            self._stack.network.mend(kind.client, name)
        else:
            self._stack.go_on(name)
