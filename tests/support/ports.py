"""Ports for processes that are started again at the same place."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 10_000


def free_ports() -> Iterator[int]:
    """Free ports, each once, that the system gives to nobody who did not ask: who had one comes back to it."""
    lowest, highest = map(int, _GIVEN_PORTS.read_text().split())
    ports = [port for port in range(_LOWEST_PORT, 1 << 16) if not lowest <= port <= highest]
    random.shuffle(ports)
    return (port for port in ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
