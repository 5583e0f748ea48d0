"""Whatever bytes come from outside, a decoder answers or refuses by name; and small inputs stay small in memory."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.support.fuzzing import Target, damaged, inputs, targets, valid_messages

NUM_INPUTS = 2000
"""Of each target; ``scripts/fuzz`` runs as many as one likes."""
SEED = 20

each_target = pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)


@each_target
def test_valid_messages_are_taken(target: Target) -> None:
    taken = [target.survives(data) for data in valid_messages(target, SEED)]
    # What a request may hold depends on other fields of it; what travels between processes is valid as it was made.
    assert all(taken) or target.name in ("completion", "chat", "ledger_event")
    assert sum(taken) > len(taken) / 4


@each_target
def test_damaged_messages_are_taken_or_refused(target: Target) -> None:
    verdicts = [target.survives(data) for data in inputs(target, SEED, NUM_INPUTS)]
    assert not all(verdicts), "damage is noticed"


@each_target
def test_every_truncation_is_taken_or_refused(target: Target) -> None:
    for data in valid_messages(target, SEED)[:8]:
        for length in range(min(len(data), 400)):
            target.survives(data[:length])


HUGE = {
    "a frame's header that announces 64 KiB": b"\x01\xff\xff",
    "an array of 4 billion": b"\x01\x00\x05\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "4 GB of bytes": b"\xc6\xff\xff\xff\xff",
    "a field of 34 GB": b"\x08\x01\x12\xff\xff\xff\xff\x7f",
    "the same behind a kind byte": b"\x00\x08\x01\x12\xff\xff\xff\xff\x7f",
    "a batch with a message of 4 GB": b"\x02\xff\xff\xff\xff",
    "nested arrays": b"\x91" * 100_000,
    "nested arrays in a frame": b"\x01\xff\xf0" + b"\x91" * 0xFFF0,
    "nested fields": b"\x0a\x7f" * 100_000,
    "nested JSON": b'{"prompt":' + b"[" * 100_000,
    "a number of 100,000 digits": b'{"seed":' + b"9" * 100_000 + b"}",
    "a logit bias of 100,000 digits": b'{"prompt":"x","logit_bias":{"' + b"9" * 100_000 + b'":1}}',
    "100,000 unknown names": b"{" + b",".join(b'"n%d":1' % number for number in range(100_000)) + b"}",
}


@each_target
@pytest.mark.parametrize("what", HUGE)
def test_a_small_message_cannot_claim_much_memory(target: Target, what: str) -> None:
    data = HUGE[what]
    tracemalloc.start()
    try:
        taken = target.survives(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not taken
    assert peak < (8 << 20) + 200 * len(data)


def test_inputs_are_drawn_from_their_seed() -> None:
    target = next(target for target in targets() if target.name == "health")
    assert list(inputs(target, 1, 50)) == list(inputs(target, 1, 50)) != list(inputs(target, 2, 50))


def test_damage_changes_messages() -> None:
    import random

    rng = random.Random(1)
    data = bytes(range(64))
    assert sum(damaged(data, rng) != data for _ in range(100)) > 90
    assert isinstance(damaged(b"", rng), bytes)
