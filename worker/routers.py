"""The routers a worker serves: one stream each, and which request's news goes to which.

A request's id names its router, so there is nothing to register. News for a router that is away is dropped here: when
it comes back it asks again (Attach with positions) and renews what it wants; when it does not, the leases end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from proto.control import FromRouter, FromWorker, LoadReport, Tokens
from proto.ids import Epoch, Generation, RequestId, router_of
from proto.request import TokenOut
from service.rpc import StreamClosed

log = logging.getLogger(__name__)


class Stream(Protocol):
    """One router's stream (``service.rpc.RouterStream``)."""

    @property
    def router_epoch(self) -> Epoch: ...

    async def receive(self) -> FromRouter:
        """Raises StreamClosed at the end."""

    def send(self, message: FromWorker) -> None:
        """Never blocks."""


class RouterStreams:
    """Live streams by router epoch. A router that connects again replaces its older stream."""

    def __init__(self) -> None:
        self._streams: dict[Epoch, Stream] = {}
        self._on_left: Callable[[Epoch], None] | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def subscribe(self, on_left: Callable[[Epoch], None]) -> None:
        """``on_left`` is called when a router's stream ends, also where the router has another one already. One
        subscriber."""
        assert self._on_left is None
        self._on_left = on_left

    async def serve(self, stream: Stream, handle: Callable[[FromRouter], None]) -> None:
        """Passes the stream's messages to ``handle`` until it ends.

        A bug met in one message is logged, and must not cost the router's other requests here.
        """
        router = stream.router_epoch
        if router in self._streams:
            self._tell_left(router)
        self._streams[router] = stream
        log.info("router %s connected", router)
        try:
            while True:
                message = await stream.receive()
                try:
                    handle(message)
                except Exception:
                    log.exception("could not take %s from router %s", type(message).__name__, router)
        except StreamClosed as end:
            log.info("router %s disconnected: %s", router, end)
        finally:
            if self._streams.get(router) is stream:
                del self._streams[router]
                self._tell_left(router)

    def _tell_left(self, router: Epoch) -> None:
        if self._on_left is not None:
            self._on_left(router)

    def has_router_of(self, request: RequestId) -> bool:
        return router_of(request) in self._streams

    def send(self, request: RequestId, message: FromWorker) -> None:
        """Queues ``message`` for the request's router. Never blocks."""
        if stream := self._streams.get(router_of(request)):
            stream.send(message)

    def send_tokens(self, tokens: Iterable[tuple[Generation, TokenOut]]) -> None:
        """One message per router with all of ``tokens`` that are its own."""
        by_router: dict[Epoch, tuple[dict[RequestId, Generation], list[TokenOut]]] = {}
        for generation, token in tokens:
            generations, outs = by_router.setdefault(router_of(token.request), ({}, []))
            generations[token.request] = generation
            outs.append(token)
        for router, (generations, outs) in by_router.items():
            if stream := self._streams.get(router):
                stream.send(Tokens(tuple(generations.items()), tuple(outs)))

    def broadcast(self, report: LoadReport) -> None:
        for stream in self._streams.values():
            stream.send(report)
