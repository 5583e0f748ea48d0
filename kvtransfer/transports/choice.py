"""From a worker's settings to what it offers and what it can use. ``auto`` is every way that works, best first.

What belongs to GPUs, and what is an extra, is loaded only where it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvtransfer.transport import BlockStore
from kvtransfer.transports import AUTO, CUDA_IPC, GRPC, MEMORY, NCCL, NIXL, SHM, InlineReader, PayloadReader
from kvtransfer.transports.shm import ShmReader, shm_offer
from proto.errors import SettingsError
from proto.handoff import TransportOffer
from proto.ids import Epoch
from service.rpc import TlsFiles

log = logging.getLogger(__name__)
T = TypeVar("T")

BEST_FIRST = (SHM, CUDA_IPC, NCCL, NIXL, GRPC)
OF_AUTO = (SHM, CUDA_IPC, GRPC)
"""Not nccl and nixl: they are for those who name them until they have been seen to work between two hosts' GPUs."""
IN_THE_CLEAR = frozenset({NCCL, NIXL})
"""They do not encrypt, and leave the host. gRPC is encrypted where the tiers are."""


def allowed_names(
    setting: Sequence[str], tls: TlsFiles | None = None, *, nccl_beside_tls: bool = False
) -> tuple[str, ...]:
    """The transports that ``setting`` names, best first as it says. Raises SettingsError for those there cannot be."""
    names: list[str] = []
    for name in setting:
        if name not in (AUTO, MEMORY, *BEST_FIRST):
            raise SettingsError(f"unknown transport {name!r}; there are {', '.join(BEST_FIRST)} and {AUTO}")
        names += OF_AUTO if name == AUTO else (name,)
    if not names:
        raise SettingsError("no transport is allowed")
    in_the_clear = next((name for name in names if name in IN_THE_CLEAR), None)
    if in_the_clear is not None and tls is not None and not nccl_beside_tls:
        raise SettingsError(
            f"transports: {in_the_clear} does not encrypt, and --rpc-tls-cert asks for encryption between the tiers. "
            f"Leave {in_the_clear} out, or allow it with --nccl-beside-tls where the network is trusted."
        )
    return tuple(dict.fromkeys(names))


def transport_offers(names: Sequence[str], store: BlockStore, *, address: str = "") -> tuple[TransportOffer, ...]:
    """What a prefill worker offers that can be reached at ``address``.

    Raises SettingsError where none of what is allowed works with its memory.
    """
    return _those_that_work(names, lambda name: _offer(name, store, address))


def payload_readers(names: Sequence[str], epoch: Epoch, tls: TlsFiles | None = None) -> tuple[PayloadReader, ...]:
    """What a decode worker of ``epoch`` can use; to be closed when it stops.

    Raises SettingsError where none of what is allowed works here.
    """
    return _those_that_work(names, lambda name: _reader(name, epoch, tls))


class _Unusable(Exception):
    """This way does not work here; the message says why."""


def _those_that_work(names: Sequence[str], make: Callable[[str], T]) -> tuple[T, ...]:
    made, reasons = [], []
    for name in allowed_names(names):
        try:
            made.append(make(name))
        except _Unusable as reason:
            log.debug("transport %s is not used: %s", name, reason)
            reasons.append(f"{name}: {reason}")
    if not made:
        raise SettingsError(f"No allowed transport works here ({'; '.join(reasons)}); allow {GRPC}, which always does.")
    return tuple(made)


def _offer(name: str, store: BlockStore, address: str) -> TransportOffer:
    if name == SHM:
        export = store.export()
        if export is None:
            raise _Unusable("this worker's memory is not a file")
        return shm_offer(export)
    if name == NIXL:
        return _nixl_offer(store)
    if name not in (CUDA_IPC, NCCL):
        return TransportOffer(name)
    device = store.on_device()
    if device is None:
        raise _Unusable("this worker's memory is not a GPU's")
    if name == NCCL:
        from kvtransfer.transports.nccl import nccl_offer

        return nccl_offer(device, store.layout, address)
    from kvtransfer.transports.cuda_driver import CudaDriver
    from kvtransfer.transports.cuda_ipc import IpcUnavailable, cuda_ipc_offer

    try:
        return cuda_ipc_offer(CudaDriver(), device)
    except IpcUnavailable as reason:
        raise _Unusable(str(reason)) from reason


def _nixl_offer(store: BlockStore) -> TransportOffer:
    from kvtransfer.transports.nixl import nixl_offer
    from kvtransfer.transports.nixl_agent import sharing_agent
    from kvtransfer.transports.nixl_landing import NixlUnavailable

    try:
        return nixl_offer(sharing_agent(), store)
    except NixlUnavailable as reason:
        raise _Unusable(str(reason)) from reason


def _nixl_reader() -> PayloadReader:
    from kvtransfer.transports.nixl import NixlReader
    from kvtransfer.transports.nixl_agent import NixlAgent
    from kvtransfer.transports.nixl_landing import NixlUnavailable

    try:
        return NixlReader(NixlAgent(shares=False))
    except NixlUnavailable as reason:
        raise _Unusable(str(reason)) from reason


def _reader(name: str, epoch: Epoch, tls: TlsFiles | None) -> PayloadReader:
    if name == SHM:
        return ShmReader()
    if name == NCCL:
        from kvtransfer.transports.nccl import NcclReader

        return NcclReader(epoch, tls)
    if name == NIXL:
        return _nixl_reader()
    if name != CUDA_IPC:
        return InlineReader(name)
    from kvtransfer.transports.cuda_driver import CudaDriver
    from kvtransfer.transports.cuda_ipc import CudaIpcReader, IpcUnavailable

    try:
        return CudaIpcReader(CudaDriver())
    except IpcUnavailable as reason:
        raise _Unusable(str(reason)) from reason
