"""host:port as text, and the address of this host. Knows names and routes; sends nothing to anybody."""

from __future__ import annotations

import ipaddress
import logging
import socket

log = logging.getLogger(__name__)

_NO_PORT_IN_PARTICULAR = 9


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The host (without brackets) and port of host:port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_host(text: str) -> bool:
    """Whether it is a host without a port: a name, an IPv4 address, or an IPv6 one, in brackets or not."""
    return bool(text) and (":" not in text or text.endswith("]") or _is_ip(text))


def own_address(peer: str | None) -> str:
    """The address that this host's name has; or, where that is loopback and ``peer`` is not, the one from which
    ``peer`` (a name or an address; None: something of this host) is reached.

    Debian's installer, for one, gives the host's name an address of loopback. May wait for a name server.
    """
    named = _named()
    if peer is None or not _is_loopback(named):
        return named
    try:
        source = _source_towards(peer)
    except (OSError, UnicodeError) as error:  # the latter of a name that no name server would take
        log.warning("this host goes by %s, as no way to %s is known: %s", named, peer, error)
        return named
    return named if _is_loopback(source) else source


def _named() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _source_towards(peer: str) -> str:
    """What the kernel would put as the sender's address; IPv4 where ``peer`` has both. Raises OSError, UnicodeError."""
    found = socket.getaddrinfo(peer, _NO_PORT_IN_PARTICULAR, type=socket.SOCK_DGRAM)
    trouble = OSError("it has no address")
    for family, kind, protocol, _, address in sorted(found, key=lambda each: each[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of UDP: it chooses a route, and no more
                source: str = probe.getsockname()[0]
                return source
        except OSError as error:
            trouble = error
    raise trouble


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
