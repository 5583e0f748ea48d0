"""Hypothesis strategies for everything that travels. What they draw is valid, and reaches into the corners."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from proto.control import (
    Abort,
    Attach,
    Failed,
    FromRouter,
    FromWorker,
    Hello,
    Load,
    LoadReport,
    ModelCard,
    Peer,
    Prefill,
    Progress,
    Redirect,
    Rejected,
    RejectReason,
    Renew,
    Role,
    Tokens,
    Welcome,
)
from proto.handoff import (
    Ack,
    Adopted,
    Fence,
    Frame,
    Grant,
    HandoffMessage,
    Located,
    Nack,
    Offer,
    Refuse,
    RefuseReason,
    Seal,
    SealedChoice,
    Stale,
    TransportOffer,
    Withdraw,
)
from proto.health import HealthReport, Phase
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import FinishReason, Request, SamplingParams, TokenLogprobs, TokenOut
from proto.wire.envelope import summed

UINT32 = st.integers(0, (1 << 32) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
COUNT = st.integers(0, (1 << 63) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SECONDS = st.floats(0, 1e9)
FLOAT = st.floats(allow_nan=False)
REQUESTS = NAME.map(RequestId)
EPOCHS = NAME.map(Epoch)
GENERATIONS = st.integers(1, (1 << 63) - 1).map(Generation)


def unit(low: float, high: float, *, open_low: bool = False) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=open_low)


TOKENS = st.lists(UINT32, max_size=6).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    n=st.just(1),
    temperature=unit(0, 2),
    top_p=unit(0, 1, open_low=True),
    top_k=st.integers(-1, (1 << 63) - 1),
    min_p=unit(0, 1),
    presence_penalty=unit(-2, 2),
    frequency_penalty=unit(-2, 2),
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    logit_bias=st.none() | st.lists(st.tuples(UINT32, unit(-100, 100)), max_size=4).map(sorted).map(tuple),
    seed=st.none() | UINT64,
    stop=st.none() | st.lists(NAME, max_size=3).map(tuple),
    stop_token_ids=st.none() | TOKENS,
    include_stop_str_in_output=st.booleans(),
    min_tokens=st.just(0),
    max_tokens=st.none() | st.integers(1, (1 << 63) - 1),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 200_000),
    allowed_token_ids=st.none() | st.lists(UINT32, min_size=1, max_size=4).map(tuple),
    skip_special_tokens=st.booleans(),
    spaces_between_special_tokens=st.booleans(),
)


@st.composite
def accepted_requests(draw: st.DrawFn) -> Request:
    n = draw(st.integers(1, 4))
    params = dataclasses.replace(draw(SAMPLING), n=n, seed=draw(UINT64), temperature=draw(unit(0.1, 2)))
    forced = draw(st.just(()) | st.lists(TOKENS, min_size=n, max_size=n).map(tuple))
    return Request(
        id=draw(REQUESTS),
        prompt=draw(st.lists(UINT32, min_size=1, max_size=8).map(tuple)),
        params=params,
        cache_salt=draw(TEXT),
        priority=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        forced=forced,
    )


@st.composite
def attaches(draw: st.DrawFn) -> Attach:
    request = draw(accepted_requests())
    n = request.params.n
    positions = draw(st.just(()) | st.lists(COUNT, min_size=n, max_size=n).map(tuple))
    return Attach(request, draw(GENERATIONS), draw(st.booleans()), draw(SECONDS), positions)


PEERS = st.builds(Peer, NAME.map(WorkerId), EPOCHS, NAME)
FROM_ROUTER: st.SearchStrategy[FromRouter] = st.one_of(
    st.builds(Hello, EPOCHS, TEXT.map(Epoch), st.integers(1, 99)),
    st.builds(Prefill, accepted_requests(), GENERATIONS, PEERS, SECONDS),
    st.builds(Redirect, REQUESTS, GENERATIONS, PEERS),
    attaches(),
    st.builds(Abort, REQUESTS, GENERATIONS, st.lists(st.integers(0, 127), max_size=3).map(tuple)),
    st.builds(Renew, st.lists(REQUESTS, max_size=5).map(tuple), SECONDS),
)

LOGPROBS = st.builds(TokenLogprobs, FLOAT, COUNT, st.lists(st.tuples(UINT32, FLOAT), max_size=4).map(tuple))
TOKEN_OUT = st.builds(
    TokenOut,
    REQUESTS,
    st.integers(0, 127),
    COUNT,
    UINT32,
    st.none() | LOGPROBS,
    st.none() | st.sampled_from(FinishReason),
    st.none() | UINT32,
)
FROM_WORKER: st.SearchStrategy[FromWorker] = st.one_of(
    st.builds(Welcome, NAME.map(WorkerId), EPOCHS, st.sampled_from(Role), st.integers(1, 99)),
    st.builds(
        Tokens,
        st.lists(st.tuples(REQUESTS, GENERATIONS), max_size=4, unique_by=lambda pair: pair[0]).map(tuple),
        st.lists(TOKEN_OUT, max_size=8).map(tuple),
    ),
    st.builds(Progress, REQUESTS, GENERATIONS, st.sampled_from(Stage), COUNT, COUNT, SECONDS),
    st.builds(Rejected, REQUESTS, GENERATIONS, st.sampled_from(RejectReason), TEXT, st.none() | SECONDS, st.booleans()),
    st.builds(Failed, REQUESTS, GENERATIONS, st.integers(400, 599), NAME, TEXT, st.none() | TEXT),
    st.builds(LoadReport, st.builds(Load, COUNT, COUNT, COUNT, COUNT, COUNT, SECONDS, COUNT)),
)

FENCES = st.builds(Fence, REQUESTS, GENERATIONS, TEXT.map(Epoch), TEXT.map(Epoch))
HASHES = st.binary(min_size=16, max_size=16).map(BlockHash)
HANDOFF: st.SearchStrategy[HandoffMessage] = st.one_of(
    st.builds(
        Offer,
        FENCES,
        NAME,
        TEXT,
        TEXT,
        st.integers(1, 1 << 40),
        st.integers(1, 128),
        st.lists(HASHES, min_size=1, max_size=5).map(tuple),
        st.lists(st.builds(TransportOffer, NAME, st.binary(max_size=20)), min_size=1, max_size=3).map(tuple),
        SECONDS,
    ),
    st.builds(Grant, FENCES, COUNT, NAME),
    st.builds(Refuse, FENCES, st.sampled_from(RefuseReason), TEXT, st.none() | SECONDS),
    st.builds(Frame, FENCES, UINT64, UINT64, st.binary(max_size=100) | st.builds(Located, UINT64)),
    st.builds(Ack, FENCES, COUNT),
    st.builds(Nack, FENCES, COUNT),
    st.builds(
        Seal,
        FENCES,
        st.integers(1, 1 << 40),
        st.integers(1, 256),
        st.lists(st.builds(SealedChoice, UINT32, st.binary(max_size=20)), min_size=1, max_size=4).map(tuple),
    ),
    st.builds(Withdraw, FENCES, TEXT),
    st.builds(Adopted, FENCES),
    st.builds(Stale, FENCES, st.integers(0, 1 << 40).map(Generation)),
)
CARDS = st.builds(
    ModelCard,
    model=NAME,
    served_names=st.lists(TEXT, max_size=3).map(tuple),
    digest=TEXT,
    max_model_len=st.integers(1, 1 << 40),
    vocab_size=st.integers(1, 1 << 40),
    eos_token_ids=TOKENS,
    block_size=st.integers(1, 1 << 20),
    layout=TEXT,
    hash_namespace=TEXT,
    files=st.dictionaries(TEXT, st.binary(max_size=50), max_size=3),
)
REPORTS = st.builds(
    HealthReport,
    st.sampled_from(Phase),
    st.booleans(),
    TEXT,
    st.none() | unit(0, 1),
    st.none() | SECONDS,
    st.booleans(),
)


# Checksums: a decoder's other checks are reached only by bytes whose checksums go with them.


_SUM_BYTES = 4
_FRAME = b"\x01"


def bare(data: bytes) -> bytes:
    """An envelope without its checksum."""
    return data[_SUM_BYTES:]


def bare_handoff(data: bytes) -> bytes:
    """A hand-off message without its checksum."""
    if data[:1] == _FRAME:
        num_header = max(0, int.from_bytes(data[1:3], "big") - _SUM_BYTES)
        return _FRAME + num_header.to_bytes(2, "big") + data[3 + _SUM_BYTES :]
    return data[:1] + data[1 + _SUM_BYTES :]


def summed_handoff(message: bytes) -> bytes:
    """The message, bare before, with the checksum that goes with it; a frame may announce more than there is."""
    if message[:1] == _FRAME and len(message) >= 3:
        end = 3 + int.from_bytes(message[1:3], "big")
        num_header = min(0xFFFF, end - 3 + _SUM_BYTES)
        return _FRAME + num_header.to_bytes(2, "big") + summed(message[3:end]) + message[end:]
    return message[:1] + summed(message[1:])
