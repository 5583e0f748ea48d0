"""Whether what a prefill worker says can be meant. Each check raises RemoteProtocolError; none changes anything."""

from __future__ import annotations

from proto.errors import RemoteProtocolError
from proto.handoff import Frame, Located, Offer, Seal
from proto.layout import KvLayout


def check_offer(offer: Offer, layout: KvLayout) -> None:
    """For an offer of our own layout; numbers of another one mean other things."""
    num_blocks = -(-offer.num_tokens // layout.block_size)
    if offer.num_tokens < 1 or len(offer.hashes) != num_blocks:
        raise RemoteProtocolError(f"an offer of {offer.num_tokens} tokens in {len(offer.hashes)} blocks")
    if offer.num_choices < 1 or not offer.lease_s > 0:
        raise RemoteProtocolError(f"an offer of {offer.num_choices} choices, kept for {offer.lease_s} s")


def check_frame(frame: Frame, offer: Offer, num_present: int, layout: KvLayout) -> None:
    if not num_present <= frame.index < len(offer.hashes):
        raise RemoteProtocolError(f"block {frame.index} was not asked for")
    if not isinstance(frame.payload, Located) and len(frame.payload) != layout.block_bytes:
        raise RemoteProtocolError(f"block {frame.index} has {len(frame.payload)} bytes")


def check_seal(seal: Seal, offer: Offer, layout: KvLayout) -> None:
    num_tokens = (seal.num_blocks - 1) * layout.block_size + seal.num_tokens_last
    if (seal.num_blocks, num_tokens) != (len(offer.hashes), offer.num_tokens):
        raise RemoteProtocolError(f"sealed {num_tokens} tokens in {seal.num_blocks} blocks, not what was offered")
    if len(seal.choices) != offer.num_choices:
        raise RemoteProtocolError(f"sealed {len(seal.choices)} choices of {offer.num_choices}")
