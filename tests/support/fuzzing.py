"""Bytes that a decoder should survive: valid messages, damaged in the ways wires and malice damage them.

A target is a decoder of bytes from outside with what it may raise. Everything is drawn from a seed, so a failure can be
repeated by its number. Hypothesis makes the valid messages; the damage is done here, as it is a thousand times faster.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import msgpack
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from kvtransfer.ledger import records
from kvtransfer.transports import grpc as grpc_link
from proto import wire
from proto.errors import InvalidRequest, NotSupported, RemoteProtocolError
from proto.settings import RouterSettings
from proto.wire.envelope import summed
from router.openai.schema import read_chat, read_completion
from router.validate import Fields, parse_object
from tests.support.http import served_model
from tests.support.messages import (
    CARDS,
    FROM_ROUTER,
    FROM_WORKER,
    HANDOFF,
    REPORTS,
    TEXT,
    bare,
    bare_handoff,
    summed_handoff,
)

_CORPUS = 100


@dataclass(frozen=True, slots=True)
class Target:
    """``decode`` takes anything, and answers or raises one of ``refuses``: nothing else."""

    name: str
    decode: Callable[[bytes], object]
    valid: st.SearchStrategy[bytes]
    refuses: tuple[type[Exception], ...] = (RemoteProtocolError,)
    tree: tuple[Callable[[bytes], object], Callable[[object], bytes]] | None = None
    """Where the bytes spell a tree of values, how to read and to write it: then values are exchanged, too."""

    def survives(self, data: bytes) -> bool:
        """Whether the bytes were taken (False: refused). Any other end is the decoder's fault and passes through."""
        try:
            self.decode(data)
        except self.refuses:
            return False
        return True


# ---- ledger ----------------------------------------------------------------------------------------------------------

_COUNTS = st.integers(0, 1 << 40)
_LOAD_NAMES = ("num_running", "num_waiting", "num_waiting_tokens", "num_free_blocks", "num_blocks")
_WORKER_MAPS = st.fixed_dictionaries(
    {
        **dict.fromkeys(("worker", "epoch", "address", "layout", "numerics", "model", "model_digest"), TEXT),
        "role": st.sampled_from(["prefill", "decode"]),
        "http_address": st.none() | TEXT,
        "block_size": _COUNTS,
        "num_blocks": _COUNTS,
        "draining": st.booleans(),
        "started_at": st.floats(0, 1e12),
        "load": st.fixed_dictionaries({**dict.fromkeys(_LOAD_NAMES, _COUNTS), "tokens_per_s": st.floats(0, 1e9)}),
    }
)
_HANDOFF_MAPS = st.fixed_dictionaries(
    {
        "request": TEXT,
        "generation": _COUNTS,
        "stage": st.sampled_from(["received", "sealed", "finished"]),
        "prefill_epoch": st.none() | TEXT,
        "decode_epoch": st.none() | TEXT,
    }
)
_EVENT_MAPS = st.fixed_dictionaries(
    {
        b"kind": st.sampled_from([b"joined", b"left", b"stored", b"evicted", b"cleared", b"replaced"]),
        b"epoch": TEXT.map(str.encode),
        b"worker": TEXT.map(str.encode),
        b"tier": TEXT.map(str.encode),
        b"sequence": _COUNTS.map(lambda count: str(count).encode()),
        b"hashes": st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(b"".join),
    }
)


def _packed(value: object) -> bytes:
    return bytes(msgpack.packb(value))


_MSGPACK = (msgpack.unpackb, _packed)


def split_entry(data: bytes) -> dict[bytes, bytes]:
    """An event of the ledger as Redis gives it, from bytes: names and values in turns."""
    parts = data.split(b"\x00\xff")
    return dict(zip(parts[::2], parts[1::2], strict=False))


def _event_bytes(entry: dict[bytes, bytes]) -> bytes:
    return b"\x00\xff".join(part for pair in entry.items() for part in pair)


# ---- HTTP ------------------------------------------------------------------------------------------------------------

_SAMPLING = {
    "model": st.just("tiny"),
    "n": st.integers(1, 3),
    "temperature": st.floats(0.1, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 100),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(1 << 63), 1 << 63),
    "stop": TEXT.filter(bool) | st.lists(TEXT.filter(bool), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
    "min_tokens": st.just(0),
    "max_tokens": st.integers(1, 100),
    "stream": st.booleans(),
    "cache_salt": TEXT.filter(bool),
    "priority": st.integers(-5, 5),
    "truncate_prompt_tokens": st.integers(1, 9),
    "metadata": st.dictionaries(TEXT, TEXT, max_size=2),
    "ignore_eos": st.booleans(),
    "return_token_ids": st.booleans(),
}
_PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT | st.lists(_PARTS, max_size=2)}
)
_COMPLETIONS = st.fixed_dictionaries(
    {"prompt": TEXT | st.lists(TEXT, min_size=1, max_size=3) | st.lists(st.integers(0, 400), min_size=1, max_size=9)},
    optional={**_SAMPLING, "echo": st.booleans(), "best_of": st.integers(1, 3), "logprobs": st.integers(0, 5)},
)
_CHATS = st.fixed_dictionaries(
    {"messages": st.lists(_MESSAGES, min_size=1, max_size=3)},
    optional={
        **_SAMPLING,
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 5),
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
        "response_format": st.just({"type": "text"}),
        "chat_template_kwargs": st.dictionaries(TEXT, st.booleans(), max_size=2),
        "tools": st.lists(st.fixed_dictionaries({"type": st.just("function")}), max_size=1),
        "tool_choice": st.sampled_from(["none", "auto"]),
    },
)


def _enveloped(name: str, decode: Callable[[bytes], object], valid: st.SearchStrategy[bytes]) -> Target:
    return Target(name, lambda data: decode(summed(data)), valid.map(bare))


@cache
def targets() -> tuple[Target, ...]:
    """Everything that reads bytes from another process or from a client.

    Where there is a checksum, it is put before the damaged bytes: nothing would get past it.
    """
    model, router = served_model(), RouterSettings()
    handoffs = HANDOFF.map(wire.encode_handoff).map(bare_handoff)

    def as_json(body: object) -> bytes:
        return json.dumps(body).encode()

    def batch(messages: Sequence[bytes]) -> bytes:
        lengths = (len(message).to_bytes(4, "big") + message for message in messages)
        return bytes((grpc_link.BATCH,)) + b"".join(lengths)

    refusals = (InvalidRequest, NotSupported)
    return (
        _enveloped("from_router", wire.decode_from_router, FROM_ROUTER.map(wire.encode_from_router)),
        _enveloped("from_worker", wire.decode_from_worker, FROM_WORKER.map(wire.encode_from_worker)),
        Target("handoff", lambda data: wire.decode_handoff(summed_handoff(data)), handoffs),
        Target(
            "batch",
            lambda data: [wire.decode_handoff(summed_handoff(bytes(part))) for part in grpc_link._unpacked(data)],
            st.lists(handoffs, max_size=4).map(batch),
        ),
        _enveloped("card", wire.decode_card, CARDS.map(wire.encode_card)),
        _enveloped("health", wire.decode_health, REPORTS.map(wire.encode_health)),
        Target("worker_record", records.decode_worker, _WORKER_MAPS.map(_packed), tree=_MSGPACK),
        Target("handoff_record", records.decode_handoff, _HANDOFF_MAPS.map(_packed), tree=_MSGPACK),
        Target("ledger_event", lambda data: records.decode_event(split_entry(data)), _EVENT_MAPS.map(_event_bytes)),
        Target(
            "completion",
            lambda data: read_completion(Fields(parse_object(data)), model, router),
            _COMPLETIONS.map(as_json),
            refusals,
            (json.loads, as_json),
        ),
        Target(
            "chat",
            lambda data: read_chat(Fields(parse_object(data)), model, router),
            _CHATS.map(as_json),
            refusals,
            (json.loads, as_json),
        ),
    )


# ---- damage ----------------------------------------------------------------------------------------------------------

_NASTY = (
    b"\xff\xff\xff\xff\x7f",  # protobuf: a length of 34 GB
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # protobuf: the largest varint
    b"\xdd\xff\xff\xff\xff",  # msgpack: an array of 4 billion
    b"\xdf\xff\xff\xff\xff",  # msgpack: a map of them
    b"\xc6\xff\xff\xff\xff",  # msgpack: 4 GB of bytes
    b"\xdb\xff\xff\xff\xff",  # msgpack: 4 GB of text
    b"\xc1\xd4\x00",  # msgpack: what is never used, and an extension
    b"\x91" * 64,  # msgpack: nested
    b"\x0a" * 64,  # protobuf: nested
    b"[" * 64,
    b'{"a":' * 64,
    b"1" * 64,
    b"1e999",
    b"-0",
    b"null",
    b"true",
    b'"\\ud800"',
    b"\xed\xa0\x80",
    b"\x00",
    b"\xff",
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four accidents."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(8):
            case 0 if at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(made):
                made[at] = rng.randrange(256)
            case 2:
                del made[at : at + rng.randint(1, 16)]
            case 3:
                made[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                made[at:at] = rng.choice(_NASTY)
            case 5:
                nasty = rng.choice(_NASTY)
                made[at : at + len(nasty)] = nasty
            case 6:
                end = rng.randrange(at, len(made) + 1)
                made[at:at] = made[at:end]
            case _:
                del made[at:]
    return bytes(made)


_VALUES: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1 << 63,
    -(1 << 63),
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "\x00",
    "9" * 30,
    [],
    [None],
    [[]],
    ["x", 1],
    [1, True, "x"],
    {},
    {"": None},
    {"x": {"x": []}},
    {"type": "text"},
    {"type": []},
)


def exchanged(value: object, rng: random.Random) -> object:
    """The tree with one value of it exchanged, left out or repeated."""
    if rng.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(_VALUES)
    if isinstance(value, dict):
        name = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {key: each for key, each in value.items() if key != name}
            case 1:
                return {**value, rng.choice(["", "x", "n", "stream", "\ud7ff"]): value[name]}
        return {**value, name: exchanged(value[name], rng)}
    at = rng.randrange(len(value))
    match rng.randrange(6):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return value * 2
    return [*value[:at], exchanged(value[at], rng), *value[at + 1 :]]


def inputs(target: Target, seed: int, count: int) -> Iterator[bytes]:
    """Mostly damaged messages, some spliced of two, some noise. The same seed gives the same."""
    corpus = valid_messages(target, seed)
    rng = random.Random(f"{target.name} {seed}")
    for _ in range(count):
        kind = rng.random()
        if target.tree is not None and kind < 0.4:
            read, write = target.tree
            yield write(exchanged(read(rng.choice(corpus)), rng))
        elif kind < 0.8:
            yield damaged(rng.choice(corpus), rng)
        elif kind < 0.95:
            head, tail = rng.choice(corpus), rng.choice(corpus)
            yield head[: rng.randrange(len(head) + 1)] + tail[rng.randrange(len(tail) + 1) :]
        else:
            yield rng.randbytes(rng.randrange(200))


@cache
def valid_messages(target: Target, seed: int, count: int = _CORPUS) -> list[bytes]:
    """Valid messages of the target; the same seed gives the same."""
    found: list[bytes] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.valid)
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found
