"""What was announced is counted once, where it was announced last, until it has room."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.ids import Epoch, RequestId
from proto.lifecycle import Stage
from router.announced import Announced

A, B = RequestId("a"), RequestId("b")
D1, D2, P1 = Epoch("d1"), Epoch("d2"), Epoch("p1")


def test_a_request_counts_for_the_others_where_it_was_placed_last() -> None:
    announced = Announced()
    announced.place(A, D1, 100)
    announced.place(B, D1, 10)
    assert announced.before(RequestId("c")) == {D1: 110}
    announced.place(A, D2, 90)
    assert announced.before(B) == {D1: 0, D2: 90}
    announced.forget(B)
    announced.forget(B)
    assert announced.before(B) == {D2: 90}


@pytest.mark.parametrize(
    ("epoch", "stage", "has_room"),
    [
        (P1, Stage.QUEUED, False),
        (P1, Stage.PREFILLING, False),
        (P1, Stage.SEALED, False),
        (P1, Stage.STREAMING, True),
        (D1, Stage.SEALED, True),
        (D1, Stage.ADOPTED, True),
        (D1, Stage.QUEUED, True),
        (D2, Stage.ADOPTED, False),
    ],
)
def test_it_has_room_when_its_blocks_travel_or_its_decode_worker_speaks(
    epoch: Epoch, stage: Stage, has_room: bool
) -> None:
    announced = Announced()
    announced.place(A, D1, 100)
    announced.progressed(A, epoch, stage)
    announced.progressed(B, epoch, stage)
    assert announced.before(B) == ({} if has_room else {D1: 100})


MOVES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["place", "progressed", "forget"]), st.integers(1, 3)),
    max_size=40,
)


@given(MOVES)
def test_the_totals_are_those_of_the_entries(moves: list[tuple[str, str, int]]) -> None:
    announced, model = Announced(), dict[RequestId, tuple[Epoch, int]]()
    for name, move, number in moves:
        request, epoch = RequestId(name), Epoch(f"d{number}")
        if move == "place":
            announced.place(request, epoch, 10 * number)
            model[request] = (epoch, 10 * number)
        elif move == "forget":
            announced.forget(request)
            model.pop(request, None)
        else:
            announced.progressed(request, epoch, Stage.DECODING)
            if request in model and model[request][0] == epoch:
                del model[request]
    expected: Counter[Epoch] = Counter()
    for epoch, num_tokens in model.values():
        expected[epoch] += num_tokens
    assert announced.before(RequestId("other")) == dict(expected)
