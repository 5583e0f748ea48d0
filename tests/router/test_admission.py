"""The door: ids, seeds and the bound."""

from __future__ import annotations

import pytest

from proto.errors import Overloaded, Unavailable
from proto.ids import Epoch
from proto.request import SamplingParams
from router.admission import Admission, seeds_from
from router.contract import NewRequest


def new(**params: int) -> NewRequest:
    return NewRequest(prompt=(1, 2, 3), params=SamplingParams(**params), cache_salt="salt", priority=2, label="theirs")  # type: ignore[arg-type]


def test_an_accepted_request_has_an_id_of_the_router_and_a_seed() -> None:
    admission = Admission(Epoch("abc"), 10, seeds_from(None))
    first, second = admission.admit(new()), admission.admit(new(seed=5))
    assert (first.id, second.id) == ("abc.1", "abc.2")
    assert second.seed == 5
    assert 0 <= first.seed < 1 << 64
    assert (first.prompt, first.cache_salt, first.priority) == ((1, 2, 3), "salt", 2)


def test_seeds_differ() -> None:
    admission = Admission(Epoch("abc"), 100, seeds_from(None))
    assert len({admission.admit(new()).seed for _ in range(50)}) == 50


def test_seeds_of_one_seed_are_the_same_in_their_order() -> None:
    def drawn(seed: int | None) -> list[int]:
        admission = Admission(Epoch("abc"), 100, seeds_from(seed))
        return [admission.admit(new()).seed for _ in range(5)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 5
    assert drawn(None) != drawn(None)


def test_the_bound_counts_those_inside() -> None:
    admission = Admission(Epoch("abc"), 2, seeds_from(None))
    first = admission.admit(new())
    admission.admit(new())
    with pytest.raises(Overloaded) as caught:
        admission.admit(new())
    assert caught.value.retry_after_s
    admission.leave(first.id)
    assert admission.num_inflight == 1
    admission.admit(new())


def test_leaving_twice_is_our_bug() -> None:
    admission = Admission(Epoch("abc"), 2, seeds_from(None))
    request = admission.admit(new())
    admission.leave(request.id)
    with pytest.raises(KeyError):
        admission.leave(request.id)


def test_a_closed_door() -> None:
    admission = Admission(Epoch("abc"), 2, seeds_from(None))
    request = admission.admit(new())
    admission.close()
    with pytest.raises(Unavailable, match="shutting down"):
        admission.admit(new())
    admission.leave(request.id)
