"""Makes the hand-off session of a computed prompt: what is offered, over which ways, to whom.

Knows the offer's contents; how it travels is ``kvtransfer``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.fences import Refusals
from kvtransfer.intake import SendEvents
from kvtransfer.send_session import Connect, SendSession
from kvtransfer.transport import BlockStore
from kvtransfer.transports import AUTO, GRPC, SHM
from kvtransfer.transports.shm import shm_offer
from prefill.job import Job
from proto.errors import SettingsError
from proto.handoff import Fence, Offer, TransportOffer
from proto.ids import Epoch
from worker.host import EngineHost

KNOWN_TRANSPORTS = (SHM, GRPC)
"""Best first."""


def chosen_transports(wanted: Sequence[str]) -> tuple[str, ...]:
    """The settings' transports in their order; ``auto`` stands for all. Raises SettingsError for an unknown one."""
    names = tuple(dict.fromkeys(name for each in wanted for name in (KNOWN_TRANSPORTS if each == AUTO else (each,))))
    if unknown := [name for name in names if name not in KNOWN_TRANSPORTS]:
        raise SettingsError(f"--transports: {unknown[0]!r} is unknown; there are auto, {', '.join(KNOWN_TRANSPORTS)}")
    return names or KNOWN_TRANSPORTS


class Dispatcher:
    """``session`` makes one hand-off for a job; the caller runs it."""

    def __init__(
        self, host: EngineHost, connect: Connect, transports: Sequence[str], *, epoch: Epoch, refusals: Refusals
    ) -> None:
        self._host = host
        self._connect = connect
        self._transports = transports
        self._epoch = epoch
        self._refusals = refusals

    def session(self, job: Job, events: SendEvents) -> SendSession:
        request, parts = job.request, self._host.parts
        layout = parts.facts.layout
        offer = Offer(
            fence=Fence(request.id, job.generation, self._epoch, job.decode.epoch),
            layout=layout.fingerprint(),
            layout_text=layout.describe(),
            numerics=parts.facts.numerics,
            num_tokens=len(request.prompt),
            num_choices=request.params.n,
            hashes=tuple(parts.hasher.all_blocks(request.prompt, request.cache_salt)),
            transports=self._offers(parts.kv),
            lease_s=job.lease_s,
        )
        return SendSession(offer, parts.kv, self._connect, job.decode, events, refusals=self._refusals)

    def _offers(self, store: BlockStore) -> tuple[TransportOffer, ...]:
        export = store.export() if SHM in self._transports else None
        offers = {GRPC: TransportOffer(GRPC)} | ({SHM: shm_offer(export)} if export else {})
        return tuple(offers[name] for name in self._transports if name in offers)
