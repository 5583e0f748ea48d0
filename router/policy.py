"""Which workers serve a request: a pure function of one view of the fleet.

    cost of a prefill worker   seconds until its queue is done + seconds for the prompt's tokens it has not cached
    cost of a decode worker    seconds to move the blocks it lacks + what its running sequences and missing room cost:
                               less where it will soon be there (``room``)
    cost of a local prefill    both on the decode worker, and nothing to move

The costs of the two workers add up, so each is the cheapest of its own role. Among equals the request's turn decides,
so they share the load. A new request that would miss a goal is turned away before any work is done for it. A resume
goes where most of what it has is cached: to a decode worker, or by way of a prefill worker that spares it the most.
Knows numbers; does no I/O and keeps no state.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from proto.control import Load, Role
from proto.errors import NoWorker, Overloaded
from proto.ids import Epoch, WorkerId
from router.room import Room

RETRY_AFTER_S = 1.0
ROOM_S = 120.0
"""How long a request may wait for room on a decode worker: predicted, or with its prompt computed already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One worker as the policy sees it.

    ``sent_*`` is what this router has sent that ``load`` does not show yet: tokens to compute, tokens that need room,
    and sequences.
    """

    worker: WorkerId
    epoch: Epoch
    role: Role
    address: str
    layout: str
    numerics: str = ""
    is_usable: bool = True
    """Its stream is alive, it is well and it is not draining."""
    is_distrusted: bool = False
    """It failed most of what it was given lately: it is used only where there is no other decode worker."""
    full_for_s: float = 0.0
    """It refused work lately and asked to be left alone for this long; 0: it takes work."""
    load: Load = field(default_factory=Load)
    sent_tokens: int = 0
    sent_room_tokens: int = 0
    sent_choices: int = 0
    ignores_priority: bool = False
    """It serves requests as they come."""

    @property
    def num_queued_tokens(self) -> int:
        """To be computed there before anything new is."""
        return self.load.num_waiting_tokens + self.sent_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The fleet at one moment. ``layout`` is the deployment's: workers of another one are not used."""

    workers: tuple[Candidate, ...]
    layout: str
    block_size: int

    @property
    def ignores_priority(self) -> bool:
        """Whether a worker that may be chosen does."""
        return any(each.ignores_priority for each in self.workers if each.is_usable and each.layout == self.layout)


class Tried(NoWorker):
    """There are workers, but this request has failed on each of them."""


class Way(enum.Enum):
    PAIR = "pair"
    """A prefill and a decode worker; or a decode worker alone where that is cheaper or all there is."""
    RESUME = "resume"
    """A decode worker alone, as it would for a prompt; or with a prefill worker that has it in its cache."""
    LOCAL = "local"
    """A decode worker that computes everything itself."""
    DECODE = "decode"
    """A decode worker to receive blocks that are held elsewhere (a redirect)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is to be placed: a prompt, and behind it what a resumed request of one choice has already. ``matches``: the
    leading blocks of it that each epoch has cached (absent: none)."""

    num_tokens: int
    num_choices: int = 1
    matches: Mapping[Epoch, int] = field(default_factory=dict)
    way: Way = Way.PAIR
    turn: int = 0
    avoid: frozenset[Epoch] = frozenset()
    """Workers this request has failed on."""
    is_new: bool = False
    """Nothing was done for it yet, so it may be turned away."""
    must_travel: bool = False
    """However short it is, and wherever it is cached, a prefill worker computes it."""
    itl_s: Mapping[Epoch, float] = field(default_factory=dict)
    """Seconds between two tokens of a request, lately, per decode worker that was heard."""
    output_tokens: float = 0.0
    """How long an answer is expected to be."""
    announced: Mapping[Epoch, int] = field(default_factory=dict)
    """Tokens of prompts that go before it and have no room yet, per decode worker. What it was just sent is of them."""
    numerics: str = ""
    """Preferred above any cost: a resume continues bit for bit on equal numerics. Empty: no matter."""

    def num_uncached(self, worker: Candidate, block_size: int) -> int:
        """Tokens of it that ``worker`` lacks: at least the last one, whose logits are needed."""
        return max(1, self.num_tokens - self.matches.get(worker.epoch, 0) * block_size)


@dataclass(frozen=True, slots=True)
class Decision:
    """``local``: ``decode`` computes the prompt too, and ``prefill`` is None (so it is for a redirect)."""

    prefill: Candidate | None
    decode: Candidate
    local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """Seconds; 0: no goal. With ``itl_s``, decode workers also keep room for what their sequences will grow by.
    ``room_s`` bounds the wait for room where ``ttft_s`` does not: it is no goal, so what nobody can tell is in time."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    room_s: float = ROOM_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """``disagg_threshold``: fewer uncached tokens than this are prefilled on the decode worker; 0: none are.

    The rest turns counts into seconds where no worker has measured any. Only their proportions matter.
    """

    disagg_threshold: int = 64
    tokens_per_s: float = 2000.0
    transfer_s_per_token: float = 2e-5
    sequence_s: float = 2e-3
    """What one more running sequence costs the others."""
    no_room_s: float = 1.0
    """What it costs to arrive where no block of the prompt has room."""
    soon_room_s: float = 0.25
    """What it costs where all of them soon will have."""
    token_s: float = 0.05
    """Seconds between two tokens of a sequence, where no decode worker was heard."""


NO_GOALS = Goals()


def choose(view: View, ask: Ask, weights: Weights, goals: Goals = NO_GOALS) -> Decision:
    """The cheapest placement.

    Raises Overloaded where every worker that could take it is full, or would miss a goal; else NoWorker, or Tried.
    """
    scale = _Scale(view, ask, weights)
    decodes = _eligible(view, ask, Role.DECODE)
    if ask.way is Way.DECODE:
        return Decision(None, _cheapest(decodes, scale.receive_s, ask), local=False)
    if ask.way is Way.RESUME:
        return _resumed(decodes, scale)
    if ask.is_new:
        decodes = _roomy(decodes, scale, goals)
    if ask.is_new and goals.itl_s:
        decodes = _unhurried(decodes, scale, goals)
    if ask.way is Way.LOCAL or not _can_prefill(view, ask):
        return Decision(None, _in_time(_cheapest(decodes, scale.local_s, ask), scale, goals), local=True)
    decode = _cheapest(decodes, scale.receive_s, ask)
    if scale.num_uncached(decode) < weights.disagg_threshold and not ask.must_travel:
        return Decision(None, _in_time(decode, scale, goals), local=True)
    prefill = _cheapest(_eligible(view, ask, Role.PREFILL), scale.compute_s, ask)
    return Decision(_in_time(prefill, scale, goals), decode, local=False)


def _resumed(decodes: list[Candidate], scale: _Scale) -> Decision:
    """On a decode worker alone, unless it lacks much of what a prefill worker has."""
    ask = scale.ask
    alone = _cheapest(decodes, scale.local_s, ask)
    sources = [worker for worker in _takers(scale.view, ask, Role.PREFILL) if scale.spares(worker, alone)]
    if not sources:
        return Decision(None, alone, local=True)
    return Decision(_cheapest(sources, scale.compute_s, ask), _cheapest(decodes, scale.receive_s, ask), local=False)


@dataclass(frozen=True, slots=True)
class _Scale:
    """The costs of one request, in seconds. Each falls, or stays, when a worker has more of the prompt cached."""

    view: View
    ask: Ask
    weights: Weights

    def num_uncached(self, worker: Candidate) -> int:
        """Prompt tokens ``worker`` would compute, or be sent."""
        return self.ask.num_uncached(worker, self.view.block_size)

    def spares(self, source: Candidate, decode: Candidate) -> bool:
        """Whether ``decode`` would compute so much that the threshold sends it to a prefill worker, and so much more
        than ``source``. Choices that have gone different ways are no one prompt, and nobody else's to compute."""
        threshold, lacking = self.weights.disagg_threshold, self.num_uncached(decode)
        spared = lacking - self.num_uncached(source)
        return self.ask.num_choices == 1 and lacking >= threshold and spared >= max(1, threshold)

    def compute_s(self, worker: Candidate) -> float:
        rate = worker.load.tokens_per_s or self._usual_rate(worker.role)
        return (worker.num_queued_tokens + self.num_uncached(worker)) / rate

    def receive_s(self, worker: Candidate) -> float:
        return self.num_uncached(worker) * self.weights.transfer_s_per_token + self._crowd_s(worker)

    def local_s(self, worker: Candidate) -> float:
        return self.compute_s(worker) + self._crowd_s(worker)

    def has_room_to_grow(self, worker: Candidate) -> bool:
        """Room for the prompt, and with what will soon be free for a usual answer, beside what the others will yet say:
        on average, half of theirs."""
        load = worker.load
        if not load.num_blocks or not self._num_sequences(worker):
            return True  # alone, it gets what there is
        size, usual = self.view.block_size, self.ask.output_tokens
        growth = usual * (self.ask.num_choices + self._num_sequences(worker) / 2)
        free = load.num_free_blocks * size - self.num_uncached(worker) - worker.sent_room_tokens
        return free >= 0 and free + load.num_soon_free_blocks * size >= growth

    def room_s(self, worker: Candidate) -> float:
        """Seconds until it has room for the prompt, if it goes on as usual; infinite where nobody can tell."""
        return self._room(worker).tokens_until * (self.ask.itl_s.get(worker.epoch) or self._usual_itl_s())

    def itl_s(self, worker: Candidate) -> float:
        """What its sequences wait for a token, if there are any."""
        return self.ask.itl_s.get(worker.epoch, 0.0) if self._num_sequences(worker) else 0.0

    def _num_sequences(self, worker: Candidate) -> int:
        return worker.load.num_running + worker.load.num_waiting + worker.sent_choices

    def _crowd_s(self, worker: Candidate) -> float:
        weights, room = self.weights, self._room(worker)
        lacking, out_of_sight = room.share_lacking, room.share_out_of_sight
        missing_s = out_of_sight * weights.no_room_s + (lacking - out_of_sight) * weights.soon_room_s
        return self._num_sequences(worker) * weights.sequence_s + missing_s

    def _room(self, worker: Candidate) -> Room:
        size, load = self.view.block_size, worker.load
        waiting = load.num_waiting_tokens if load.num_waiting else 0  # else they are of what has its room
        coming = max(worker.sent_room_tokens, self.ask.announced.get(worker.epoch, 0))
        return Room(
            load=load,
            own=-(-self.num_uncached(worker) // size) + self.ask.num_choices,
            ahead=-(-(coming + waiting) // size) + worker.sent_choices,
            usual_tokens=self.ask.output_tokens,
        )

    def _usual_rate(self, role: Role) -> float:
        """For a worker that has computed nothing yet: as fast as the fastest of its role."""
        known = (worker.load.tokens_per_s for worker in self.view.workers if worker.role is role)
        return max(known, default=0.0) or self.weights.tokens_per_s

    def _usual_itl_s(self) -> float:
        """For a worker that was not heard yet: as fast as the fastest."""
        return min(self.ask.itl_s.values(), default=0.0) or self.weights.token_s


def _alive(view: View, role: Role) -> list[Candidate]:
    """Those that may be given work: the trusted ones. A prompt can do without prefill workers, but without a decode
    worker nothing goes on: rather a distrusted one than none."""
    usable = [worker for worker in view.workers if worker.role is role and worker.is_usable]
    trusted = [worker for worker in usable if not worker.is_distrusted]
    return trusted or (usable if role is Role.DECODE else [])


def _eligible(view: View, ask: Ask, role: Role) -> list[Candidate]:
    """Live workers of ``role`` that can take this request. Raises NoWorker, Tried or Overloaded where there is none."""
    alive = _alive(view, role)
    if not alive:
        raise NoWorker(f"no {role.value} worker is connected")
    agreeing = [worker for worker in alive if worker.layout == view.layout]
    if not agreeing:
        other = alive[0]
        raise NoWorker(
            f"no {role.value} worker serves this deployment's model: {other.worker} has KV layout {other.layout}, "
            f"the deployment has {view.layout}; start every worker with the same model, dtype and block size"
        )
    takers = _takers(view, ask, role)
    if takers:
        return takers
    untried = [worker for worker in agreeing if worker.epoch not in ask.avoid]
    if not untried and any(worker.full_for_s <= 0 for worker in agreeing):
        raise Tried(f"every {role.value} worker has been tried")
    # Better to wait for one that is full than to go back to one that has failed this request.
    wait = min(worker.full_for_s for worker in untried or agreeing)
    raise Overloaded(f"every {role.value} worker's queue is full", retry_after_s=wait)


def _can_prefill(view: View, ask: Ask) -> bool:
    """Whether there is a prefill worker that has not failed this request; one that is full is worth waiting for."""
    alive = _alive(view, Role.PREFILL)
    return any(worker.epoch not in ask.avoid or worker.full_for_s > 0 for worker in alive)


def _takers(view: View, ask: Ask, role: Role) -> list[Candidate]:
    """Live workers of ``role`` that can take this request; perhaps none."""
    return [
        worker
        for worker in _alive(view, role)
        if worker.layout == view.layout and worker.full_for_s <= 0 and worker.epoch not in ask.avoid
    ]


def _roomy(workers: list[Candidate], scale: _Scale, goals: Goals) -> list[Candidate]:
    """Those that will have room for a new request in time. Raises Overloaded where there is none."""
    bound_s = min(goals.ttft_s or goals.room_s, goals.room_s)
    late_s = [scale.room_s(worker) - bound_s for worker in workers]
    if not goals.ttft_s:
        late_s = [0.0 if math.isinf(late) else late for late in late_s]
    found = [worker for worker, late in zip(workers, late_s, strict=True) if late <= 0]
    if not found:
        message = f"no decode worker would have room for it within {bound_s:g} s"
        wait_s = min(late_s)
        raise Overloaded(message, retry_after_s=max(RETRY_AFTER_S, wait_s) if math.isfinite(wait_s) else RETRY_AFTER_S)
    return found


def _unhurried(workers: list[Candidate], scale: _Scale, goals: Goals) -> list[Candidate]:
    """Those that keep their pace with one more. Raises Overloaded where there is none."""
    found = [each for each in workers if scale.itl_s(each) <= goals.itl_s and scale.has_room_to_grow(each)]
    if not found:
        raise Overloaded(f"no decode worker would keep to {goals.itl_s:g} s per token", retry_after_s=RETRY_AFTER_S)
    return found


def _in_time(worker: Candidate, scale: _Scale, goals: Goals) -> Candidate:
    """The fastest worker, unless even it is too slow for a new request. Raises Overloaded then.

    One with nothing to compute takes what it is given: waiting would not help, and only work tells its rate anew.
    """
    late_s = scale.compute_s(worker) - goals.ttft_s
    if scale.ask.is_new and goals.ttft_s and worker.num_queued_tokens and late_s > 0:
        message = f"the first token would take more than {goals.ttft_s:g} s"
        raise Overloaded(message, retry_after_s=max(RETRY_AFTER_S, late_s))
    return worker


def _cheapest(workers: Sequence[Candidate], cost: Callable[[Candidate], float], ask: Ask) -> Candidate:
    """Equal numerics first where asked for, then cost, then whose turn it is."""
    count = len(workers)

    def key(at: int) -> tuple[bool, float, int]:
        worker = workers[at]
        foreign = bool(ask.numerics) and worker.numerics != ask.numerics
        return foreign, cost(worker), (at - ask.turn) % count

    return workers[min(range(count), key=key)]
