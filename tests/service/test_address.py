"""host:port as text, and the address that this host goes by, over a made-up name service and made-up routes."""

from __future__ import annotations

import socket

import pytest

from service.address import is_host, join_address, own_address, split_address

INSTALLED = "127.0.1.1"
"""What Debian's installer writes into /etc/hosts beside the host's name."""


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("localhost", 80, "localhost:80"), ("::1", 80, "[::1]:80"), ("10.0.0.1", 9, "10.0.0.1:9")],
)
def test_addresses_there_and_back(host: str, port: int, address: str) -> None:
    assert join_address(host, port) == address
    assert split_address(address) == (host, port)


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:http", "host:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        split_address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pod-7.example", True),
        ("10.0.0.2", True),
        ("fd00::2", True),
        ("[fd00::2]", True),
        ("10.0.0.2:9000", False),
        ("[fd00::2]:9000", False),
        ("10.0.0.2:", False),
        ("http://10.0.0.2", False),
        ("", False),
    ],
)
def test_a_host_alone(text: str, expected: bool) -> None:
    assert is_host(text) is expected


class FakeRoutes:
    """In the place of ``socket.socket``: what is not in ``sources`` has no route. Nothing may be sent."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._peer = ""

    def __call__(self, family: int, kind: int, protocol: int) -> FakeRoutes:
        assert kind == socket.SOCK_DGRAM
        return self

    def __enter__(self) -> FakeRoutes:
        return self

    def __exit__(self, *why: object) -> None:
        self._peer = ""

    def connect(self, address: tuple[str, int]) -> None:
        if address[0] not in self._sources:
            raise OSError(101, "Network is unreachable")
        self._peer = address[0]

    def getsockname(self) -> tuple[str, int]:
        return self._sources[self._peer], 1


def named(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def answer(name: str) -> str:
        if address is None:
            raise socket.gaierror("Name or service not known")
        return address

    monkeypatch.setattr("socket.gethostbyname", answer)


@pytest.mark.parametrize("name", [INSTALLED, None])
@pytest.mark.parametrize(("peer", "source"), [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
def test_a_name_of_loopback_is_no_use_to_those_elsewhere(
    monkeypatch: pytest.MonkeyPatch, name: str | None, peer: str, source: str
) -> None:
    named(monkeypatch, name)
    monkeypatch.setattr("socket.socket", FakeRoutes({peer: source}))
    assert own_address(peer) == source


@pytest.mark.parametrize("peer", [None, "127.0.0.1", "localhost", "::1"])
def test_among_those_on_this_host_loopback_will_do(monkeypatch: pytest.MonkeyPatch, peer: str | None) -> None:
    named(monkeypatch, INSTALLED)
    assert own_address(peer) == INSTALLED


def test_a_name_that_others_can_use_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "10.0.0.2")
    monkeypatch.setattr("socket.socket", FakeRoutes({"192.168.0.1": "192.168.0.2"}))
    assert own_address("192.168.0.1") == "10.0.0.2"


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ({"fd00::1": "fd00::2", "10.0.0.1": "10.0.0.2"}, "10.0.0.2"),
        ({"fd00::1": "fd00::2"}, "fd00::2"),
        ({}, INSTALLED),
    ],
)
def test_of_several_addresses_one_that_there_is_a_way_to(
    monkeypatch: pytest.MonkeyPatch, routes: dict[str, str], expected: str
) -> None:
    six = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fd00::1", 9, 0, 0))
    four = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.0.0.1", 9))
    named(monkeypatch, INSTALLED)
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, type: [six, four])
    monkeypatch.setattr("socket.socket", FakeRoutes(routes))
    assert own_address("redis.example") == expected


@pytest.mark.parametrize("trouble", [socket.gaierror("Name or service not known"), UnicodeError("label too long")])
def test_a_peer_that_nobody_knows_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    def unknown(host: str, port: int, type: int) -> None:
        raise trouble

    named(monkeypatch, INSTALLED)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert own_address("redis.example") == INSTALLED
    assert f"goes by {INSTALLED}, as no way to redis.example is known: {trouble}" in caplog.text


def test_this_very_hosts_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, INSTALLED)
    found = own_address("198.51.100.1")
    if found == INSTALLED:
        pytest.skip("this machine has no way out")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.bind((found, 0))  # nobody else's address can be bound
