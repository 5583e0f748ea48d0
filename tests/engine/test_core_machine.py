"""Two engines, a prefill and a decode one, driven at random. Every token must be the oracle's, whatever happens.

The engines are tiny, so that blocks run out, and prompts come from a small tree of prefixes, so that they share blocks.
Some schedule a step while the one before is computed, on a runner that computes at once or as late as it can. Integrity
is recomputed after every operation, and at the end everything drains.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core import EngineCore
from engine.output import StepOutput
from engine.sequence import Reservation
from proto.errors import InvalidRequest
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId, RequestId
from proto.inventory import Cleared, Evicted, Stored
from proto.request import Request, TokenOut
from tests.support.paged_engine import VOCAB, ZERO, FakeMemory, FakeRunner, make_facts, make_request, oracle

HEADS = tuple(tuple(2 + (i * i * k + i) % (VOCAB - 2) for i in range(11)) for k in range(1, 4))

prompts = st.builds(
    lambda head, length, tail: (*head[:length], *tail),
    st.sampled_from(HEADS),
    st.integers(0, 11),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
)


@dataclass(frozen=True)
class Form:
    prompt: tuple[int, ...]
    n: int
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    priority: int
    salt: str


forms = st.builds(
    Form,
    prompt=prompts,
    n=st.integers(1, 3),
    max_tokens=st.sampled_from([9, 14, 5, 2, 1, None]),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    priority=st.integers(0, 2),
    salt=st.sampled_from(["", "", "", "s"]),
)


class Injected(Exception):
    """A failure of the runner: of the step that is asked for, or of the one that runs ahead of it."""


class Engine:
    """A core on a fake memory. ``announced`` is what holders of a held prompt's blocks were promised."""

    def __init__(
        self, num_blocks: int, budget: int, threshold: int, policy: str, cached: bool, chunked: bool, pace: str
    ) -> None:
        self.facts = make_facts(
            num_blocks=num_blocks,
            max_model_len=30,
            max_num_seqs=5,
            max_num_batched_tokens=budget if chunked else 40,
            long_prefill_token_threshold=threshold,
        )
        self.memory = FakeMemory(self.facts)
        self.hasher = BlockHasher("fake", self.facts.block_size)
        self.runner = FakeRunner(self.memory, self.facts, is_late=pace == "ahead of a late device")
        self.core = EngineCore(
            self.runner,
            self.memory,
            self.facts,
            self.hasher,
            enable_prefix_caching=cached,
            enable_chunked_prefill=chunked,
            policy=policy,
            runs_ahead=pace != "one by one",
        )
        self.announced: dict[RequestId, dict[BlockId, list[int]]] = {}
        self.inventory: set[BlockHash] = set()

    def step(self) -> StepOutput:
        output = self.core.step()
        for filled in output.filled:
            mine = self.announced.setdefault(filled.request, {})
            assert filled.first_index == len(mine)
            mine |= {block: list(self.memory.cells[block]) for block in filled.blocks}
        self.take_events()
        return output

    def take_events(self) -> None:
        for event in self.core.take_cache_events():
            match event:
                case Stored(hashes):
                    self.inventory |= set(hashes)
                case Evicted(hashes):
                    self.inventory -= set(hashes)
                case Cleared():
                    self.inventory.clear()

    def check(self) -> None:
        self.core.check_integrity()
        for blocks in self.announced.values():
            for block, cells in blocks.items():
                assert self.memory.cells[block] == cells, "an announced block changed before its release"

    def let_go(self, request: RequestId) -> None:
        self.announced.pop(request, None)


@dataclass
class Expected:
    """What is still to come of a request on one engine, per choice."""

    request: Request
    rest: dict[int, list[TokenOut]]
    is_hold: bool = False
    first: dict[int, int] = field(default_factory=dict)
    """First tokens that a hold has sampled."""

    @property
    def is_over(self) -> bool:
        return not any(self.rest.values())


class CoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engines: list[Engine] = []
        self.expected: dict[tuple[Engine, RequestId], Expected] = {}
        self.rooms: dict[RequestId, Reservation] = {}
        self.num_made = 0

    @initialize(
        blocks=st.tuples(st.integers(8, 14), st.integers(8, 14)),
        budget=st.integers(3, 20),
        threshold=st.sampled_from([0, 0, 5]),
        policy=st.sampled_from(["fcfs", "priority"]),
        cached=st.sampled_from([True, True, True, False]),
        chunked=st.sampled_from([True, True, False]),
        pace=st.sampled_from(
            ["one by one", "ahead of a late device", "ahead of a late device", "ahead of a quick one"]
        ),
    )
    def start(
        self, blocks: tuple[int, int], budget: int, threshold: int, policy: str, cached: bool, chunked: bool, pace: str
    ) -> None:
        self.engines = [Engine(n, budget, threshold, policy, cached, chunked, pace) for n in blocks]
        self.prefill, self.decode = self.engines

    # -- what tiers do ----------------------------------------------------------------------------------------------

    @rule(on_prefill=st.booleans(), form=forms)
    def add(self, on_prefill: bool, form: Form) -> None:
        self._add(self.prefill if on_prefill else self.decode, self._request(form), hold=False)

    @rule(form=forms)
    def add_held(self, form: Form) -> None:
        self._add(self.prefill, self._request(form), hold=True)

    @rule(form=forms, steps_between=st.integers(0, 2), is_lost=st.sampled_from([False, False, True]), data=st.data())
    def hand_over(self, form: Form, steps_between: int, is_lost: bool, data: st.DataObject) -> None:
        """The usual life of a request, from beginning to end, while the decode engine is at work."""
        request = self._request(form)
        self._add(self.prefill, request, hold=True)
        for _ in range(12):
            self._step(self.prefill)
        for held in self._held():
            if held.request.id == request.id:
                self._offer(request)
                for _ in range(steps_between):
                    self._step(self.decode)
                if request.id in self.rooms:
                    self._transfer(held, is_lost, data)

    def _request(self, form: Form) -> Request:
        self.num_made += 1
        return make_request(
            f"r{self.num_made}",
            form.prompt,
            n=form.n,
            max_tokens=form.max_tokens,
            min_tokens=min(form.min_tokens, form.max_tokens or 3),
            ignore_eos=form.ignore_eos,
            stop_token_ids=(1,),
            priority=form.priority,
            salt=form.salt,
            seed=self.num_made % 3,
        )

    def _add(self, engine: Engine, request: Request, *, hold: bool) -> None:
        try:
            engine.core.add(request, hold=hold)
        except InvalidRequest:
            assert len(request.prompt) + (request.params.max_tokens or 1) > 30
            return
        rest = {choice: self._whole(engine, request, choice, hold) for choice in range(request.params.n)}
        self.expected[engine, request.id] = Expected(request, rest, hold)

    @staticmethod
    def _whole(engine: Engine, request: Request, choice: int, hold: bool) -> list[TokenOut]:
        forced = request.forced[choice] if request.forced else ()
        if forced:
            fresh = oracle(replace(request, forced=()), choice, engine.facts)
            return fresh[len(forced) :]
        return oracle(request, choice, engine.facts)[: 1 if hold else None]

    @rule(prompt=prompts, n=st.integers(1, 3), sent=st.lists(st.integers(0, 6), min_size=3, max_size=3))
    def resume(self, prompt: tuple[int, ...], n: int, sent: list[int]) -> None:
        """A client has seen some of each choice already; a choice may even be over."""
        self.num_made += 1
        whole = make_request(f"r{self.num_made}", prompt, n=n, max_tokens=6, stop_token_ids=(1,))
        seen = [tuple(t.token for t in oracle(whole, choice, self.decode.facts)[: sent[choice]]) for choice in range(n)]
        self._add(self.decode, replace(whole, forced=tuple(seen)), hold=False)

    @rule(
        on_prefill=st.booleans(),
        times=st.integers(1, 6),
        fails=st.sampled_from([-1, -1, 0, 1, 2]),
        is_late=st.booleans(),
    )
    def step(self, on_prefill: bool, times: int, fails: int, is_late: bool) -> None:
        """Some steps. The runner may fail in one of them, after which all is tried again."""
        engine = self.prefill if on_prefill else self.decode
        failures = engine.runner.late_failures if is_late else engine.runner.failures
        for index in range(times):
            if index == fails:
                failures.append(Injected())
            self._step(engine)
            failures.clear()

    @rule(on_prefill=st.booleans())
    def device_gets_on(self, on_prefill: bool) -> None:
        """A step that is under way is computed before anybody asks for it."""
        (self.prefill if on_prefill else self.decode).runner.run_next()

    def _step(self, engine: Engine) -> None:
        if not engine.core.has_work():
            return
        try:
            output = engine.step()
        except Injected:
            engine.check()
            return
        for token in output.tokens:
            expected = self.expected[engine, token.request]
            assert token == expected.rest[token.choice].pop(0)
            if expected.is_hold:
                expected.first[token.choice] = token.token
                if expected.is_over and token.choice == expected.request.params.n - 1:
                    self._hold_computed(engine, expected, token)
        engine.check()

    def _hold_computed(self, engine: Engine, expected: Expected, token: TokenOut) -> None:
        request = expected.request
        finished = [oracle(request, choice, engine.facts)[0].finish for choice in range(request.params.n)]
        if None not in finished:  # Over at the first token: what was announced is let go.
            engine.let_go(request.id)
            engine.core.release(request.id)
            del self.expected[engine, request.id]
            return
        table = engine.core.block_table(request.id)
        assert tuple(engine.announced[request.id]) == table
        padding = [ZERO] * (-len(request.prompt) % engine.facts.block_size)
        assert engine.memory.read(table, len(request.prompt) + len(padding)) == [*request.prompt, *padding]

    def _held(self) -> list[Expected]:
        return [e for (engine, _), e in self.expected.items() if engine is self.prefill and e.is_hold and e.is_over]

    @rule(data=st.data())
    @precondition(lambda self: any(e.is_hold for e in self.expected.values()))
    def offer(self, data: st.DataObject) -> None:
        """D is asked for room: at any time, as an offer travels while the prompt computes."""
        open_offers = [e for e in self.expected.values() if e.is_hold and e.request.id not in self.rooms]
        open_offers = [e for e in open_offers if (self.decode, e.request.id) not in self.expected]
        if not open_offers:
            return
        self._offer(data.draw(st.sampled_from(open_offers)).request)

    def _offer(self, request: Request) -> None:
        hashes = self.decode.hasher.all_blocks(request.prompt, request.cache_salt)
        try:
            room = self.decode.core.reserve(request.id, hashes, len(request.prompt), request.params.n)
        except InvalidRequest:
            return
        if room is not None:
            self.rooms[request.id] = room

    @rule(data=st.data(), is_lost=st.booleans())
    @precondition(lambda self: any(e.request.id in self.rooms for e in self._held()))
    def transfer(self, data: st.DataObject, is_lost: bool) -> None:
        """P's cells are copied to D's. Either all, and D adopts; or some, and D keeps those."""
        self._transfer(
            data.draw(st.sampled_from([e for e in self._held() if e.request.id in self.rooms])), is_lost, data
        )

    def _transfer(self, held: Expected, is_lost: bool, data: st.DataObject) -> None:
        request = held.request
        room = self.rooms.pop(request.id)
        table = self.prefill.core.block_table(request.id)
        stop = data.draw(st.integers(room.num_present, len(table))) if is_lost else len(table)
        for index in range(room.num_present, stop):
            self.decode.memory.cells[room.blocks[index]][:] = self.prefill.memory.cells[table[index]]
        if is_lost:
            self.decode.core.cancel(request.id, stop)
            return
        first = [held.first[choice] for choice in range(request.params.n)]
        try:
            self.decode.core.adopt(request, first)
        except InvalidRequest:
            self.decode.core.cancel(request.id, stop)
            return
        rest = {choice: oracle(request, choice, self.decode.facts)[1:] for choice in range(request.params.n)}
        self.expected[self.decode, request.id] = Expected(request, rest)
        self._release(request.id)

    @rule(data=st.data(), is_sure=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.expected)
    def abort(self, data: st.DataObject, is_sure: bool) -> None:
        if not is_sure:
            return
        engine, request = data.draw(st.sampled_from(sorted(self.expected, key=lambda key: key[1])))
        engine.let_go(request)
        engine.core.abort(request)
        del self.expected[engine, request]

    @rule(data=st.data())
    @precondition(lambda self: self._held())
    def release(self, data: st.DataObject) -> None:
        self._release(data.draw(st.sampled_from(self._held())).request.id)

    def _release(self, request: RequestId) -> None:
        self.prefill.let_go(request)
        self.prefill.core.release(request)
        del self.expected[self.prefill, request]

    @rule(data=st.data())
    @precondition(lambda self: self.rooms)
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.rooms)))
        del self.rooms[request]
        self.decode.core.cancel(request)

    @rule(data=st.data(), choice=st.integers(0, 2))
    @precondition(lambda self: any(not e.is_hold for e in self.expected.values()))
    def finish_choice(self, data: st.DataObject, choice: int) -> None:
        keys = sorted((key for key, e in self.expected.items() if not e.is_hold), key=lambda key: key[1])
        engine, request = data.draw(st.sampled_from(keys))
        engine.core.finish_choice(request, choice)
        self.expected[engine, request].rest.pop(choice, None)

    # -- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def is_sound(self) -> None:
        for engine in self.engines:
            engine.check()

    def teardown(self) -> None:
        """Holds and reservations end; then all that is left runs to its end by itself, and every block is free."""
        for engine in self.engines:
            for request in list(self.rooms):
                engine.core.cancel(request)
            while engine.core.has_work() or self._held():
                self._step(engine)
                for held in self._held():
                    self._release(held.request.id)
            engine.check()
            assert engine.core.is_idle()
            engine.take_events()
            assert engine.inventory == set(engine.core.cached_hashes())
        if self.engines:
            assert all(expected.is_over for expected in self.expected.values())


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
