"""Another model takes over the deployment: what began with the one before ends with it, or not at all."""

from __future__ import annotations

import pytest

from proto.control import Role
from proto.errors import WorkerLost
from proto.lifecycle import Stage
from proto.request import SamplingParams
from router.contract import NewRequest
from router.flow import RequestStream
from tests.support.fleet import LAYOUT, House, read_all, token


async def replaced(*more: str) -> tuple[House, RequestStream, str]:
    """A request that is generated on a decode worker, when the deployment becomes another model's."""
    house = House("p1", "d1", *more)
    stream = await house.start()
    decode, _ = house.last_attach()
    house.says("p1", token(stream.id, 0))
    house.reports(decode, stream.id, Stage.ADOPTED)
    house.join("p8", Role.PREFILL, layout="layout-b")
    house.join("d9", Role.DECODE, layout="layout-b")
    house.kill("p1")
    house.fleet.layout = "layout-b"
    return house, stream, decode


async def test_a_request_never_goes_on_with_another_model() -> None:
    house, stream, decode = await replaced()
    house.kill(decode)
    house.timers.advance(60.0)
    assert await anext(stream) == [token(stream.id, 0)]
    with pytest.raises(WorkerLost, match="no worker is left to go on"):
        await anext(stream)
    assert (house.sent_to("p8"), house.sent_to("d9")) == ([], [])


async def test_a_request_goes_on_with_its_own_model_where_that_is_left() -> None:
    house, stream, decode = await replaced("d2")
    house.kill(decode)
    other, attach = house.last_attach()
    assert {decode, other} == {"d1", "d2"}
    assert (attach.local, attach.request.forced) == (True, ((0,),))
    house.says(other, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_without_its_own_prefill_worker_a_request_starts_again_on_its_own_decode_worker() -> None:
    house = House("p1", "d1")
    await house.start()
    house.join("p8", Role.PREFILL, layout="layout-b")
    house.join("d9", Role.DECODE, layout="layout-b")
    house.fleet.layout = "layout-b"
    house.kill("p1")
    to, attach = house.last_attach()
    assert (to, attach.local, attach.generation) == ("d1", True, 2)


async def test_a_prompt_that_was_read_for_the_model_before_goes_to_that_one() -> None:
    house = House("p1", "d1")
    house.join("p8", Role.PREFILL, layout="layout-b")
    house.join("d9", Role.DECODE, layout="layout-b")
    house.fleet.layout = "layout-b"
    await house.flow.start(NewRequest(prompt=(1, 2, 3), params=SamplingParams(max_tokens=9), layout=LAYOUT))
    assert (house.last_prefill()[0], house.last_attach()[0]) == ("p1", "d1")
    await house.start()
    assert (house.last_prefill()[0], house.last_attach()[0]) == ("p8", "d9")
