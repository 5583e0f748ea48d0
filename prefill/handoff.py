"""Makes the hand-off session of a computed prompt: what is offered, over which ways, to whom.

Knows the offer's contents; how it travels is ``kvtransfer``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvtransfer.fences import Refusals
from kvtransfer.intake import SendEvents
from kvtransfer.send_session import Connect, SendSession
from kvtransfer.transports.choice import transport_offers
from prefill.job import Job
from proto.handoff import Fence, Offer, TransportOffer
from proto.ids import Epoch
from worker.host import EngineHost


class Dispatcher:
    """``session`` makes one hand-off for a job; the caller runs it. ``address``: where decode workers reach us."""

    def __init__(
        self,
        host: EngineHost,
        connect: Connect,
        transports: Sequence[str],
        *,
        epoch: Epoch,
        refusals: Refusals,
        address: Callable[[], str] = str,
    ) -> None:
        self._host = host
        self._connect = connect
        self._transports = transports
        self._epoch = epoch
        self._refusals = refusals
        self._address = address
        self._offers: tuple[TransportOffer, ...] = ()

    async def open(self) -> None:
        """Makes what every hand-off offers, off the event loop: registering memory takes its time. Before the first
        ``session``. Raises SettingsError where none of the transports works here."""
        kv, address = self._host.parts.kv, self._address()
        self._offers = await asyncio.to_thread(transport_offers, self._transports, kv, address=address)

    def session(self, job: Job, events: SendEvents) -> SendSession:
        assert self._offers, "opened before the first prompt"
        request, parts = job.request, self._host.parts
        layout = parts.facts.layout
        offer = Offer(
            fence=Fence(request.id, job.generation, self._epoch, job.decode.epoch),
            layout=layout.fingerprint(),
            layout_text=layout.describe(),
            numerics=parts.facts.numerics,
            num_tokens=len(request.prefix),
            num_choices=request.params.n,
            hashes=tuple(parts.hasher.all_blocks(request.prefix, request.cache_salt)),
            transports=self._offers,
            lease_s=job.lease_s,
        )
        return SendSession(offer, parts.kv, self._connect, job.decode, events, refusals=self._refusals)
