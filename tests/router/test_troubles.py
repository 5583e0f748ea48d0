"""Whatever happens, in any order: a client reads one sequence, and one end."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from proto.control import RejectReason, Role
from proto.errors import TandemError
from proto.lifecycle import Stage
from router.deadlines import StageLimits
from tests.support.fleet import House, token

TROUBLES = st.lists(
    st.tuples(
        st.sampled_from(
            ["first", "next", "adopted", "kill", "join", "reject", "time", "stop", "repeat", "news", "blink", "alone"]
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(troubles=TROUBLES, closes=st.booleans(), num_choices=st.integers(1, 2))
def test_whatever_happens_the_client_reads_one_sequence_and_one_end(
    troubles: list[tuple[str, int]], closes: bool, num_choices: int
) -> None:
    """Workers answer, repeat themselves, refuse, fall silent, lose their streams, die and come back in any order. The
    prompt is in the caches of prefill workers, so that a single choice's resumes go there first."""

    async def run() -> None:
        limits = StageLimits(queued_s=12.0, prefill_s=9.0, transfer_s=4.0, silence_s=6.0)
        house = House("p1", "p2", "d1", "d2", max_attempts=4, limits=limits, request_timeout_s=1e9)
        stream = await house.start(n=num_choices)
        joined = 2
        for what, number in troubles:
            for name in (worker.epoch for worker in house.fleet.workers.values() if worker.role is Role.PREFILL):
                house.index.stored(name, house.fleet.hasher().full_blocks(range(10)))
            to, attach = house.last_attach()
            names = [worker.worker for worker in house.fleet.workers.values()]
            prefills = [name for name in names if name.startswith("p")]
            choice = number % num_choices
            if what == "first" and prefills and not attach.local:
                name, prefill = house.last_prefill()
                position = prefill.request.num_forced[choice]
                house.says(name, token(stream.id, position, choice=choice, last=position == 6))
            elif what == "alone":
                house.reports(to, stream.id, Stage.QUEUED)
            elif what in ("next", "repeat"):
                positions = attach.positions[choice] + number
                house.says(to, token(stream.id, positions, choice=choice, last=positions == 6))
            elif what == "adopted":
                house.reports(to, stream.id, Stage.ADOPTED)
            elif what == "kill" and names:
                house.kill(names[number % len(names)])
            elif what == "join":
                joined += 1
                role = Role.PREFILL if number % 2 else Role.DECODE
                house.join(f"{'p' if number % 2 else 'd'}{joined}", role)
            elif what == "reject" and names:
                reason = list(RejectReason)[number % len(RejectReason)]
                house.rejects(names[number % len(names)], stream.id, reason, held=number > 3)
            elif what == "blink" and names:
                house.blink(names[number % len(names)])
            elif what == "time":
                house.timers.advance(float(number))
            elif what == "stop":
                stream.stop_choice(choice)
            elif what == "news" and names:
                house.reports(names[number % len(names)], stream.id, list(Stage)[number], generation=1 + number % 3)
        if closes:
            await stream.aclose()
        else:
            house.timers.advance(10_000.0)
        seen: dict[int, list[int]] = {0: [], 1: []}
        try:
            async for batch in stream:
                for out in batch:
                    assert out.token == 1000 * out.choice + out.position
                    seen[out.choice].append(out.position)
        except TandemError:
            pass
        for positions in seen.values():
            assert positions == list(range(len(positions)))
        assert len(house.heard.ends) == 1
        assert house.heard.ends[0].stage.is_terminal
        assert house.flow.num_inflight == house.admission.num_inflight == 0
        house.timers.advance(100.0)
        assert house.timers.num_live == 0

    asyncio.run(run())
