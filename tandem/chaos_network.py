"""The network of a stack that is to be harmed: in front of each worker a proxy, which is all that others know of it.

Knows names, ports and processes of workers; what passes is ``bench.chaos.proxy``'s.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.chaos.proxy import Proxy
from tandem.supervisor import ChildSpec

_HOST = "127.0.0.1"
_SLOW_S = 0.05
"""What each piece is held up on a slow way."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a worker listens. ``keeper`` has the port bound, so that nobody else is given it while the worker is away:
    it does not listen, and with SO_REUSEADDR on both sides the worker may."""

    keeper: socket.socket
    proxy: Proxy


class Network:
    """A ``bench.chaos.faults.Network``; ``start`` before the workers, ``stop`` after them.

    ``tier_of`` names the tier of a process, given its id.
    """

    def __init__(self, workers: Sequence[str], tier_of: Callable[[int], str]) -> None:
        self._workers = workers
        self._tier_of = tier_of
        self._places: dict[str, _Place] = {}

    async def start(self) -> None:
        for name in self._workers:
            keeper = socket.socket()
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.bind((_HOST, 0))
            place = self._places[name] = _Place(keeper, Proxy((_HOST, _port(keeper)), self._tier_of))
            await place.proxy.start()

    async def stop(self) -> None:
        """Also when ``start`` was cut short; may be called twice."""
        for place in self._places.values():
            await place.proxy.stop()
            place.keeper.close()

    def wired(self, spec: ChildSpec) -> ChildSpec:
        """A worker listens at one place for good, and is known by its proxy's."""
        if (place := self._places.get(spec.name)) is None:
            return spec
        mine = {"TANDEM_PORT": str(_port(place.keeper)), "TANDEM_ADVERTISE": f"{_HOST}:{place.proxy.port}"}
        return replace(spec, environ={**spec.environ, **mine})

    @property
    def num_flipped(self) -> int:
        return sum(place.proxy.num_flipped for place in self._places.values())

    def cut(self, client: str, name: str) -> None:
        self._places[name].proxy.set(client, is_cut=True)

    def silence(self, client: str, name: str) -> None:
        self._places[name].proxy.set(client, is_silent=True)

    def slow(self, client: str, name: str) -> None:
        self._places[name].proxy.set(client, delay_s=_SLOW_S)

    def mend(self, client: str, name: str) -> None:
        self._places[name].proxy.set(client, is_cut=False, is_silent=False, delay_s=0.0)

    def flip(self, client: str, name: str, num_flips: int) -> None:
        self._places[name].proxy.set(client, num_flips=num_flips)


def _port(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port
