"""Where a request's next try goes: whom it avoids, what it prefers, and how long it waits where nobody can take it.

Knows one request's experience with its workers; which of the others is best is the policy's, and what a try does is the
life's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proto.control import Rejected, RejectReason
from proto.errors import NoWorker, Overloaded, WorkerLost
from proto.ids import Epoch
from proto.lifecycle import Stage
from proto.request import Request
from router.attempt import Dispatcher, Rules
from router.patience import LONGEST_PAUSE_S, Patience
from router.policy import Decision, Tried, Way
from router.recovery import Remedy
from router.timers import Alarm, Timers


class Search:
    """``find`` workers, or ``wait``: ``again`` is called when it is time to ask once more."""

    def __init__(self, dispatcher: Dispatcher, rules: Rules, timers: Timers, again: Callable[[], None]) -> None:
        self.numerics = ""
        """Of the worker that spoke last: a resume prefers the same."""
        self.stays_on_decode = False
        """A resume by way of a prefill worker came to nothing: the next one is a decode worker's alone."""
        self._dispatcher = dispatcher
        self._timers = timers
        self._again = again
        self._patience = Patience(rules.patience_s, rules.room_patience_s)
        self._pause = Alarm(timers)
        self._failed: set[Epoch] = set()
        self._without_room: set[Epoch] = set()
        self._hint_s: float | None = None

    # What the request has met with.

    def was_rejected(self, epoch: Epoch, news: Rejected) -> None:
        """What that worker says of itself holds for every request."""
        if news.reason is RejectReason.FULL:
            self._dispatcher.mark_full(epoch, news.retry_after_s or LONGEST_PAUSE_S)
        elif news.reason is RejectReason.DRAINING:
            self._dispatcher.mark_draining(epoch)

    def avoid(self, epochs: Iterable[Epoch]) -> None:
        """They failed it, or take nothing at present."""
        self._failed.update(epochs)

    def avoid_only(self, epoch: Epoch) -> None:
        """It was this one's fault, whoever else it looked like."""
        self._failed = {epoch}

    def had_no_room(self, epoch: Epoch | None, hint_s: float | None) -> bool:
        """That decode worker refused its blocks; whether to ask on. It may still compute the prompt, in its turn."""
        if epoch is not None:
            self._without_room.add(epoch)
        self._hint_s = hint_s
        return self._patience.refused(self._timers.time())

    @property
    def is_refused(self) -> bool:
        """Whether decode workers have no room for its blocks, as far as is known."""
        return self._patience.is_refused

    @property
    def lacks_room(self) -> bool:
        """Whether a decode worker could take its blocks, if only it had room."""
        return bool(self._without_room)

    def moved_on(self) -> None:
        """A decode worker has the request, or generates."""
        self._patience.moved_on()
        self._without_room.clear()
        self.stays_on_decode = False

    # The search.

    def find(self, request: Request, remedy: Remedy, *, is_new: bool = False) -> Decision:
        """Raises NoWorker or Overloaded: then ``wait``, or give up."""
        self.close()
        way = self._way(remedy)
        avoided = self._failed if way is Way.LOCAL else self._failed | self._without_room
        decision = self._dispatcher.place(request, way, frozenset(avoided), self.numerics, is_new=is_new)
        self._patience.placed()
        return decision

    def wait(self, error: NoWorker | Overloaded, stage: Stage) -> None:
        """Sees to it that ``again`` is called: after a pause where workers are full or were only avoided, and with
        patience where there are none at all. Raises WorkerLost when that is at its end."""
        if isinstance(error, Overloaded):
            self._wait(error.retry_after_s)
        elif isinstance(error, Tried):
            self._failed.clear()
            self._without_room.clear()
            self._wait(self._hint_s)
        elif self._patience.alone(self._timers.time()):
            self._wait(None)
        else:
            message = f"no worker is left to go on from stage {stage.value}: {error.message}"
            raise WorkerLost(message, stage=stage.value)

    def close(self) -> None:
        """``again`` will not be called. Idempotent."""
        self._pause.cancel()

    def _way(self, remedy: Remedy) -> Way:
        match remedy:
            case Remedy.REDIRECT:
                return Way.DECODE
            case Remedy.RESUME:
                return Way.LOCAL if self.stays_on_decode else Way.RESUME
            case _:
                return Way.PAIR

    def _wait(self, at_least: float | None) -> None:
        self._pause.set(self._patience.pause(at_least), self._again)
