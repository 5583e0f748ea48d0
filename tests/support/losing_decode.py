"""A decode worker that loses its device in the middle of its first hand-off, once: as a kill of P during a copy may do.

    python -m tests.support.losing_decode MARKER

MARKER is a file that does not exist yet; it says that the device was lost. The device itself is made up: what comes
after a source's DeviceLost is what is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import decode.server
from kvtransfer.transport import BlockStore
from kvtransfer.transports import Payload, PayloadReader, PayloadSource
from kvtransfer.transports.choice import payload_readers
from proto.errors import DeviceLost
from proto.ids import BlockId, Epoch
from service.rpc import TlsFiles
from tandem.cli import main

MARKER = Path(sys.argv[1])


def is_first() -> bool:
    if MARKER.exists():
        return False
    MARKER.touch()
    return True


class LosingReader:
    def __init__(self, reader: PayloadReader) -> None:
        self._reader = reader
        self.name = reader.name

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> PayloadSource | None:
        source = await self._reader.open(detail, epoch, store)
        return None if source is None else LosingSource(source)

    def close(self) -> None:
        self._reader.close()


class LosingSource:
    def __init__(self, source: PayloadSource) -> None:
        self._source = source
        self.batch_bytes = source.batch_bytes
        self.close = source.close

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        if is_first():
            raise DeviceLost("this process has lost its device: an illegal memory access was encountered")
        return await self._source.place(payloads, blocks, store)


def losing_readers(names: Sequence[str], epoch: Epoch, tls: TlsFiles | None) -> tuple[PayloadReader, ...]:
    return tuple(LosingReader(reader) for reader in payload_readers(names, epoch, tls))


if __name__ == "__main__":
    decode.server.payload_readers = losing_readers
    sys.exit(main(["decode"]))
