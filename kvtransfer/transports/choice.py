"""From a worker's settings to what it offers and what it can use. ``auto`` is every way that works, best first."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.transport import BlockStore
from kvtransfer.transports import AUTO, GRPC, MEMORY, SHM, InlineReader, PayloadReader
from kvtransfer.transports.shm import ShmReader, shm_offer
from proto.errors import SettingsError
from proto.handoff import TransportOffer

BEST_FIRST = (SHM, GRPC)


def allowed_names(setting: Sequence[str]) -> tuple[str, ...]:
    """The transports that ``setting`` names, best first as it says. Raises SettingsError for unknown ones."""
    names: list[str] = []
    for name in setting:
        if name not in (AUTO, MEMORY, *BEST_FIRST):
            raise SettingsError(f"unknown transport {name!r}; there are {', '.join(BEST_FIRST)} and {AUTO}")
        names += BEST_FIRST if name == AUTO else (name,)
    if not names:
        raise SettingsError("no transport is allowed")
    return tuple(dict.fromkeys(names))


def transport_offers(setting: Sequence[str], store: BlockStore) -> tuple[TransportOffer, ...]:
    """What a prefill worker offers. Raises SettingsError where none of what is allowed works with its memory."""
    offers: list[TransportOffer] = []
    for name in allowed_names(setting):
        if name != SHM:
            offers.append(TransportOffer(name))
        elif (export := store.export()) is not None:
            offers.append(shm_offer(export))
    if not offers:
        raise SettingsError(f"transports {', '.join(setting)}: this worker's memory cannot be shared; allow {GRPC}")
    return tuple(offers)


def payload_readers(setting: Sequence[str]) -> tuple[PayloadReader, ...]:
    """What a decode worker can use; to be closed when it stops. Raises SettingsError."""
    return tuple(ShmReader() if name == SHM else InlineReader(name) for name in allowed_names(setting))
