import asyncio

import pytest

from proto.ids import Epoch, RequestId
from worker.leases import Leases

A, B, OTHER = RequestId("r.1"), RequestId("r.2"), RequestId("s.1")


class Expired:
    def __init__(self) -> None:
        self.requests: list[RequestId] = []
        self._news = asyncio.Event()

    def __call__(self, request: RequestId) -> None:
        self.requests.append(request)
        self._news.set()

    async def wait_for(self, count: int) -> None:
        while len(self.requests) < count:
            self._news.clear()
            await self._news.wait()


@pytest.fixture
async def expired() -> Expired:
    return Expired()


async def test_a_lease_that_is_not_renewed_ends_once(expired: Expired) -> None:
    leases = Leases(expired)
    leases.grant(A, 0.01)
    await expired.wait_for(1)
    assert expired.requests == [A]
    assert A not in leases


async def test_a_shorter_lease_ends_before_a_longer_one_that_came_first(expired: Expired) -> None:
    leases = Leases(expired)
    leases.grant(A, 3600.0)
    leases.grant(B, 0.01)
    await expired.wait_for(1)
    assert expired.requests == [B]
    assert A in leases
    leases.close()


async def test_an_ended_lease_neither_expires_nor_comes_back_by_renewal(expired: Expired) -> None:
    leases = Leases(expired)
    leases.grant(A, 0.005)
    leases.end(A)
    leases.end(A)
    leases.renew(A, 0.005)
    leases.grant(B, 0.02)
    await expired.wait_for(1)
    assert expired.requests == [B]


async def test_renewal_moves_the_deadline(expired: Expired) -> None:
    leases = Leases(expired)
    leases.grant(A, 0.02)
    leases.renew(A, 3600.0)
    leases.grant(B, 0.03)
    await expired.wait_for(1)
    assert expired.requests == [B]
    assert A in leases
    leases.close()
    assert len(leases) == 0


async def test_what_a_router_does_not_name_again_ends_soon_after_its_stream(expired: Expired) -> None:
    leases = Leases(expired, away_s=0.02)
    for request in (A, B, OTHER):
        leases.grant(request, 3600.0)
    leases.router_left(Epoch("r"))
    leases.renew(B, 3600.0)
    await expired.wait_for(1)
    assert expired.requests == [A]
    assert B in leases
    assert OTHER in leases
    leases.close()


async def test_a_routers_leaving_makes_no_lease_longer(expired: Expired) -> None:
    leases = Leases(expired, away_s=3600.0)
    leases.grant(A, 0.01)
    leases.router_left(Epoch("r"))
    await expired.wait_for(1)
    assert len(leases) == 0


async def test_what_is_granted_while_its_router_is_away_ends_soon(expired: Expired) -> None:
    here = {A}
    leases = Leases(expired, here.__contains__, away_s=0.02)
    for request in (A, B):
        leases.grant(request, 3600.0)
    await expired.wait_for(1)
    assert expired.requests == [B]
    assert A in leases
    leases.close()


def test_a_lease_whose_time_has_come_does_not_stop_the_next_one_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def grant_two() -> list[RequestId]:
        ended: list[RequestId] = []
        leases = Leases(ended.append)
        leases.grant(A, 0.0)
        leases.grant(B, 3600.0)
        await asyncio.sleep(0.01)
        leases.close()
        return ended

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(grant_two()) == [A]
