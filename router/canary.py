"""Whether the KV path works: a tiny prompt goes through a prefill and a decode worker, and its tokens are looked at.

    asked ──▶ the last verdict, at once
       └── it is old, and no real request crossed the path since: a canary flies, and makes the next verdict

Its prompt has a salt of its own, so its block must travel; its priority is the last, it is in no metrics and on no
ledger. A canary that is turned away for want of room says nothing of the path, and the last verdict stays; one that
fails where there is other work says nothing at first: the queue may have been in its way.
Knows requests and answers; knows no sockets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proto.control import Role
from proto.errors import NoWorker, Overloaded, TandemError
from proto.request import SamplingParams, TokenOut
from router.contract import NewRequest, RequestStreamLike
from router.policy import Candidate, View

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
NUM_TOKENS = 4
AGAIN_S = 1.0
"""Age at which bad news is old."""
EXCUSE_S = 60.0
"""How long other work excuses a canary's failure, since the path last worked or could not be tried."""


class CanaryStream(RequestStreamLike, Protocol):
    @property
    def is_refused(self) -> bool:
        """Whether it waits for a decode worker with room for its blocks."""


class Path(Protocol):
    """Where canaries fly (``flow``)."""

    @property
    def last_adopted_at(self) -> float:
        """When a decode worker last had all blocks of a real request, on the router's clock."""

    async def start_canary(self, new: NewRequest) -> CanaryStream:
        """Like ``start``, always through a prefill worker, and told to nobody."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``trouble`` names the pair and what is wrong; empty: nothing is. ``at`` is on the router's clock."""

    trouble: str
    at: float


class CanaryFailed(TandemError):
    """The answer came, and is not what it should be."""


class Canary:
    """``verdict`` as often as you like; ``close`` it. ``every_s`` is the age at which a verdict is old."""

    def __init__(
        self,
        path: Path,
        view: Callable[[], View],
        vocab_size: Callable[[], int],
        every_s: float,
        clock: Callable[[], float],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._path = path
        self._view = view
        self._vocab_size = vocab_size
        self._every_s = every_s
        self._clock = clock
        self._timeout_s = timeout_s
        self._verdict: Verdict | None = None
        self._expected: dict[tuple[str, str, str], tuple[int, ...]] = {}
        self._excused_since = clock()
        self._flight: asyncio.Task[None] | None = None

    def verdict(self) -> Verdict | None:
        """The newest; None before the first, and where there is no path to test."""
        if not self._every_s or not _pair_exists(self._view()):
            return None
        if self._flight is None and self._is_old():
            self._flight = asyncio.create_task(self._fly(), name="canary")
        return self._verdict

    @property
    def is_pending(self) -> bool:
        """The first canary has not come back."""
        return self._verdict is None and self._flight is not None

    async def close(self) -> None:
        """May be called twice."""
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait([self._flight])

    def _is_old(self) -> bool:
        now = self._clock()
        if now - self._path.last_adopted_at < self._every_s:
            self._verdict = Verdict("", self._path.last_adopted_at)
        if self._verdict is None:
            return True
        return now - self._verdict.at >= (min(AGAIN_S, self._every_s) if self._verdict.trouble else self._every_s)

    async def _fly(self) -> None:
        is_busy = _is_busy(self._view())  # asked before: a canary is work, too
        try:
            trouble = await self._try()
            now = self._clock()
            if not trouble:
                self._excused_since = now
            elif not _pair_exists(self._view()):
                trouble = ""  # one of the pair has left: the workers' own trouble, which is reported as such
            elif is_busy and now - max(self._excused_since, self._path.last_adopted_at) < EXCUSE_S:
                log.info("a canary failed beside other work, which says nothing yet: %s", trouble)
                trouble = ""
            else:
                log.error("the KV path does not work: %s", trouble)
            self._verdict = Verdict(trouble, now)
        except Overloaded as error:
            log.info("a canary was turned away, which says nothing of the path: %s", error.message)
            self._excused_since = self._clock()
            self._verdict = Verdict(self._verdict.trouble if self._verdict else "", self._excused_since)
        finally:
            self._flight = None

    async def _try(self) -> str:
        """What is wrong; a wrong answer is asked for twice, since numbers may differ in their last bits.

        Raises Overloaded.
        """
        try:
            trouble = await self._ask() and await self._ask()
            if trouble:
                self._expected.clear()  # if it was the first answer that was wrong, the next ones tell
            return trouble
        except NoWorker:
            return ""  # there is no pair any more

    async def _ask(self) -> str:
        """One canary. Raises NoWorker, and Overloaded where there is no room for it."""
        vocab, view = self._vocab_size(), self._view()
        prompt = tuple((7 * at + 1) % vocab for at in range(view.block_size + 1))
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, seed=0)
        new = NewRequest(
            prompt=prompt,
            params=params,
            cache_salt=secrets.token_hex(8),
            label="canary",
            layout=view.layout,
        )
        stream: CanaryStream | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                stream = await self._path.start_canary(new)
                tokens = [out async for batch in stream for out in batch]
            self._check(stream, tokens, view)
        except (NoWorker, Overloaded):
            raise
        except TimeoutError:
            if stream is not None and stream.is_refused:
                raise Overloaded(f"{stream.decode_worker} has no room for its blocks") from None
            return f"{_pair(stream)}: no answer within {self._timeout_s:g} s"
        except TandemError as error:
            return f"{_pair(stream)}: {error.message}"
        finally:
            if stream is not None:
                await stream.aclose()
        return ""

    def _check(self, stream: RequestStreamLike, tokens: list[TokenOut], view: View) -> None:
        """Raises CanaryFailed."""
        answer = tuple(out.token for out in tokens)
        if len(answer) != NUM_TOKENS:
            raise CanaryFailed(f"{len(answer)} tokens came instead of {NUM_TOKENS}")
        if _pair_exists(view) and not stream.num_bytes_moved:
            raise CanaryFailed("the answer came, and no KV moved")
        numerics = {each.worker: each.numerics for each in view.workers}
        prefill, decode = stream.prefill_worker, stream.decode_worker
        key = (view.layout, numerics.get(prefill, "") if prefill else "", numerics.get(decode, "") if decode else "")
        expected = self._expected.setdefault(key, answer)
        if answer != expected:
            raise CanaryFailed(f"the tokens {list(answer)} came, where {list(expected)} came before")


def _pair(stream: RequestStreamLike | None) -> str:
    if stream is None:
        return "no pair was found"
    return f"{stream.prefill_worker} → {stream.decode_worker}"


def _usable(view: View, role: Role) -> list[Candidate]:
    return [each for each in view.workers if each.role is role and each.is_usable and each.layout == view.layout]


def _pair_exists(view: View) -> bool:
    return bool(_usable(view, Role.PREFILL)) and bool(_usable(view, Role.DECODE))


def _is_busy(view: View) -> bool:
    return any(each.load.num_running + each.load.num_waiting > 0 for each in view.workers if each.is_usable)
