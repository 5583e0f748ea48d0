"""The life of one request: tries, one after the other, until it ends once.

    place ──▶ try (generation g) ──▶ tokens in order ──▶ FINISHED
      ▲              │
      └── recover ◀──┘ trouble: redirect, restart or resume under generation g + 1; or wait for a worker, then place

Everything here is a reaction: to a worker's message, a lost worker, the client, or a timer. ``recovery`` says what a
trouble calls for, the dispatcher finds workers and carries messages. Knows no sockets, no Redis and no text.
"""

from __future__ import annotations

import dataclasses
import logging

from proto.control import Abort, Attach, Failed, Peer, Prefill, Progress, Redirect, Rejected, RejectReason
from proto.errors import DeadlineExceeded, NoWorker, Overloaded, RemoteProtocolError, TandemError, WorkerLost
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import Request, TokenOut
from router.assembly import TokenAssembly
from router.attempt import Alarm, Dispatcher, Listener, RequestEnd, Rules, Timers, Try
from router.buffer import TokenBuffer
from router.patience import LONGEST_PAUSE_S, Patience
from router.policy import Candidate, Decision, Way
from router.recovery import Remedy, Side, Situation, after_loss, after_rejection, error_of, is_nobodys_fault
from router.stages import StageChange, StageClock

log = logging.getLogger(__name__)

_WAY = {Remedy.RESTART: Way.PAIR, Remedy.RESUME: Way.LOCAL, Remedy.REDIRECT: Way.DECODE}


class Life:
    """One request. ``begin`` once; afterwards every method may be called at any time, also after the end."""

    def __init__(
        self,
        request: Request,
        label: str,
        rules: Rules,
        dispatcher: Dispatcher,
        listener: Listener,
        timers: Timers,
    ) -> None:
        self.request = request
        self.label = label
        self.buffer = TokenBuffer()
        self.assembly = TokenAssembly(request.params.n)
        self.num_cached = 0
        self.num_bytes_moved = 0
        self.prefill_worker: WorkerId | None = None
        self.decode_worker: WorkerId | None = None
        self._rules = rules
        self._dispatcher = dispatcher
        self._listener = listener
        self._timers = timers
        self._arrived = timers.time()
        self._clock = StageClock(self._arrived)
        self._try = Try(Generation(0), None, Generation(0), None, local=True)
        self._need: Remedy | None = None
        self._avoid: set[Epoch] = set()
        self._numerics = ""
        self._num_faults = 0
        self._room_hint_s: float | None = None
        self._patience = Patience(rules.patience_s, rules.room_patience_s)
        self._deadline, self._pause, self._verdict = Alarm(timers), Alarm(timers), Alarm(timers)

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def stage(self) -> Stage:
        return self._clock.stage

    @property
    def is_over(self) -> bool:
        return self.stage.is_terminal

    @property
    def is_waiting(self) -> bool:
        """Whether it needs a worker and has found none."""
        return self._need is not None

    @property
    def times(self) -> dict[Stage, float]:
        return self._clock.times

    @property
    def current(self) -> Try:
        return self._try

    def workers(self) -> list[Candidate]:
        """Who holds something for this request under the current try."""
        prefill = None if self._try.adopted else self._try.prefill
        return [worker for worker in (prefill, self._try.decode) if worker is not None]

    # From the flow: the start, and the ends it can bring about.

    def begin(self) -> None:
        """Places the request and tells its workers. Raises NoWorker or Overloaded, and then nothing has happened."""
        decision = self._dispatcher.place(self.request, Way.PAIR, frozenset(), "")
        self._deadline.set(self._rules.request_timeout_s, self._expire)
        self._listener.placed(local=decision.local)
        self._start(decision, Remedy.RESTART)

    def close(self) -> None:
        """The client is gone, or done. Idempotent."""
        self._end(Stage.ABORTED, None)

    def fail(self, error: TandemError) -> None:
        self._end(Stage.FAILED, error)

    def stop_choice(self, choice: int) -> None:
        if self.is_over or not self.assembly.stop(choice):
            return
        self.buffer.drop(choice)
        if self.assembly.is_complete:
            self._end(Stage.FINISHED, None)
        elif self._try.local or self._try.adopted:
            self._stop_on_decode((choice,))

    # From workers.

    def tokens_came(self, epoch: Epoch, generation: Generation, tokens: list[TokenOut]) -> None:
        side = self._admit(epoch, generation)
        if side is None:
            return
        self._note_tokens_from(side)
        try:
            accepted = [ready for out in tokens for ready in self.assembly.accept(out)]
        except RemoteProtocolError as error:
            log.error("%s: a worker broke the protocol: %s", self.id, error)
            self._recover(self._situation().again)
            return
        if accepted:
            self._listener.tokens_came(accepted, self._timers.time())
            self.buffer.push(accepted)
        if self.assembly.is_complete:
            self._end(Stage.FINISHED, None)
        elif len(self.buffer) > self._rules.max_buffered_tokens:
            self.buffer.clear()
            self.fail(Overloaded(f"cut off: {self._rules.max_buffered_tokens} tokens were not read in time"))

    def progress_came(self, epoch: Epoch, news: Progress) -> None:
        side = self._admit(epoch, news.generation)
        if side is None:
            return
        if side is Side.PREFILL or self._try.local:
            self.num_cached = max(self.num_cached, news.num_cached)
        if news.stage is Stage.ADOPTED:
            if news.generation != self._try.generation:
                return  # the worker it speaks of was given up meanwhile
            if side is Side.DECODE:
                self.num_bytes_moved += news.num_bytes
            self._adopted()
        elif not news.stage.is_terminal and news.stage not in (Stage.RECEIVED, Stage.ROUTED):
            self._advance(news.stage)

    def rejected(self, epoch: Epoch, news: Rejected) -> None:
        side = self._admit(epoch, news.generation)
        if side is None or news.generation != self._try.generation:
            return
        if self._need is not None:
            self._prefill_spoke_up(news)
            return
        if news.reason is RejectReason.FULL:
            self._dispatcher.mark_full(epoch, news.retry_after_s or LONGEST_PAUSE_S)
        elif news.reason is RejectReason.DRAINING:
            self._dispatcher.mark_draining(epoch)
        remedy = after_rejection(side, news.reason, news.held, self._situation())
        log.info("%s: %s says %s (%s): %s", self.id, epoch, news.reason.value, news.message, remedy.value)
        if remedy is Remedy.NONE:
            return
        self._avoid |= self._blamed(epoch, news.reason, remedy)
        self._room_hint_s = news.retry_after_s
        is_refused = remedy is Remedy.REDIRECT and news.reason is RejectReason.REFUSED
        if is_refused and not self._patience.refused(self._timers.time()):
            patience, stage = self._rules.room_patience_s, self.stage.value
            self.fail(Overloaded(f"no decode worker had room within {patience:g} s", stage=stage))
            return
        self._recover(remedy, counts=not is_nobodys_fault(news.reason))

    def failed(self, epoch: Epoch, news: Failed) -> None:
        side = self._admit(epoch, news.generation)
        if side is not None and not (side is Side.PREFILL and self._try.adopted):
            self.fail(error_of(news, self.stage.value))

    def worker_lost(self, epoch: Epoch) -> None:
        """This incarnation is gone. Nothing it still sends is admitted."""
        side = self._try.side_of(epoch)
        if self.is_over or side is None:
            return
        if side is Side.PREFILL:
            self._try.prefill = None
        else:
            self._try.decode = None
        if self._need is not None:
            self._need = self._situation().again  # only the prefill worker is known to a request that waits
            return
        remedy = after_loss(side, self._situation())
        log.info("%s: lost its %s worker in stage %s: %s", self.id, side.value, self.stage.value, remedy.value)
        if remedy is Remedy.AWAIT_VERDICT:
            self._verdict.set(self._rules.verdict_s, self._no_verdict)
        elif remedy is not Remedy.NONE:
            self._recover(remedy)

    # Recovery.

    def wake(self) -> None:
        """A worker came, or a pause is over: tries to place the request again, if it is waiting."""
        if self._need is None or self.is_over:
            return
        self._pause.cancel()
        remedy = self._need
        try:
            decision = self._dispatcher.place(self.request, _WAY[remedy], frozenset(self._avoid), self._numerics)
        except Overloaded as error:
            if remedy is Remedy.RESTART and not self._num_faults:
                self.fail(error)
            else:
                self._wait(error.retry_after_s)
        except NoWorker as error:
            self._wait_alone(error)
        else:
            self._need = None
            self._patience.placed()
            self._start(decision, remedy)

    def _recover(self, remedy: Remedy, *, counts: bool = True) -> None:
        """Lets go of what the remedy does not use, and looks for a worker."""
        self._num_faults += counts
        if self._num_faults >= self._rules.max_attempts:
            stage = self.stage.value
            self.fail(WorkerLost(f"given up after {self._num_faults} attempts, the last in stage {stage}", stage=stage))
            return
        self._listener.recovering(remedy)
        self._verdict.cancel()
        self.assembly.forget_held_back()
        self._let_go(keep_prefill=remedy is Remedy.REDIRECT)
        self._need = remedy
        self.wake()

    def _wait_alone(self, error: NoWorker) -> None:
        """No worker can take it: a pause where some were only avoided, and patience where there are none at all."""
        if self._avoid:
            self._avoid.clear()
            self._wait(self._room_hint_s)
            return
        if not self._patience.alone(self._timers.time()):
            stage = self.stage.value
            self.fail(WorkerLost(f"no worker is left to go on from stage {stage}: {error.message}", stage=stage))
        else:
            self._wait(None)

    def _blamed(self, epoch: Epoch, reason: RejectReason, remedy: Remedy) -> set[Epoch]:
        """Whom the next try should do without, if it can."""
        if remedy is Remedy.REDIRECT:
            return {self._try.decode.epoch} if self._try.decode is not None else set()
        return {epoch} if is_nobodys_fault(reason) else set()

    def _prefill_spoke_up(self, news: Rejected) -> None:
        """While the request waits for a decode worker, its prefill worker may let go of the blocks."""
        if not news.held:
            self._try.prefill = None
            self._need = self._situation().again

    def _wait(self, at_least: float | None) -> None:
        self._pause.set(self._patience.pause(at_least), self.wake)

    def _start(self, decision: Decision, remedy: Remedy) -> None:
        """The next generation. The decode worker is told first, so that it expects what the prefill worker offers."""
        last, params = self._try, self.request.params
        generation = Generation(last.generation + 1)
        request = self.request
        if remedy is Remedy.RESUME:
            request = dataclasses.replace(request, forced=self.assembly.accepted())
        if remedy is Remedy.REDIRECT:
            self._try = Try(generation, last.prefill, last.prefill_since, decision.decode, local=False)
        else:
            self._try = Try(generation, decision.prefill, generation, decision.decode, decision.local)
        self.prefill_worker = (self._try.prefill or decision.decode).worker
        self.decode_worker = decision.decode.worker
        self._advance(Stage.ROUTED)
        positions = self.assembly.positions() if remedy is Remedy.RESUME else (0,) * params.n
        local, lease_s = self._try.local, self._rules.lease_s
        self._dispatcher.send(decision.decode, Attach(request, generation, local, lease_s, positions))
        if remedy is Remedy.RESUME:
            self._stop_on_decode(self.assembly.done_choices())
        if self._try.prefill is not None:
            decode = decision.decode
            peer = Peer(decode.worker, decode.epoch, decode.address)
            if remedy is Remedy.REDIRECT:
                self._dispatcher.send(self._try.prefill, Redirect(self.id, generation, peer))
            else:
                self._dispatcher.send(self._try.prefill, Prefill(request, generation, peer, lease_s))

    def _let_go(self, *, keep_prefill: bool) -> None:
        abort = Abort(self.id, self._try.generation)
        if self._try.decode is not None:
            self._dispatcher.send(self._try.decode, abort)
            self._try.decode = None
        if self._try.prefill is not None and not keep_prefill:
            self._dispatcher.send(self._try.prefill, abort)
            self._try.prefill = None

    # Small steps.

    def _situation(self) -> Situation:
        return Situation(
            prefill_has_blocks=self._try.prefill is not None and not self._try.adopted,
            adopted=self._try.adopted or self._try.local,
            started=self.assembly.is_started,
            lacks_first=not self._try.local and self.assembly.lacks_first,
        )

    def _admit(self, epoch: Epoch, generation: Generation) -> Side | None:
        if self.is_over:
            return None
        side = self._try.admits(epoch, generation)
        if side is None:
            self._listener.refused("stale")
        return side

    def _note_tokens_from(self, side: Side) -> None:
        speaker = self._try.decode if side is Side.DECODE else self._try.prefill
        assert speaker is not None
        if side is Side.PREFILL:
            self._advance(Stage.SEALED)
        else:
            if not self._try.local:
                self._adopted()
            self._patience.moved_on()
            self._advance(Stage.DECODING)
        if side is Side.DECODE or not self._try.adopted:
            self._numerics = speaker.numerics

    def _adopted(self) -> None:
        if self._try.adopted:
            return
        self._try.adopted = True
        self._patience.moved_on()
        self._verdict.cancel()
        self._advance(Stage.ADOPTED)
        self._stop_on_decode(self.assembly.stopped_choices())

    def _stop_on_decode(self, choices: tuple[int, ...]) -> None:
        if choices and self._try.decode is not None:
            self._dispatcher.send(self._try.decode, Abort(self.id, self._try.generation, choices))

    def _no_verdict(self) -> None:
        if not self.is_over and not self._try.adopted:
            self._recover(self._situation().again)

    def _expire(self) -> None:
        timeout, stage = self._rules.request_timeout_s, self.stage.value
        self.fail(DeadlineExceeded(f"not finished within {timeout:g} s; in stage {stage}", stage=stage))

    def _advance(self, stage: Stage) -> None:
        now = self._timers.time()
        for previous, seconds, entered in self._clock.advance(stage, now):
            self._listener.stage_changed(
                StageChange(
                    request=self.id,
                    label=self.label,
                    generation=self._try.generation,
                    previous=previous,
                    stage=entered,
                    seconds=seconds,
                    at=now,
                    prefill=self._try.prefill.epoch if self._try.prefill else None,
                    decode=self._try.decode.epoch if self._try.decode else None,
                )
            )

    def _end(self, stage: Stage, error: TandemError | None) -> None:
        """The one way out. Workers that do not know of the end by themselves are told."""
        if self.is_over:
            return
        self._advance(stage)
        decode_knows = (self._try.local or self._try.adopted) and not self.assembly.stopped_choices()
        if not (stage is Stage.FINISHED and decode_knows):
            self._let_go(keep_prefill=False)
        self._need = None
        self._pause.cancel()
        self._verdict.cancel()
        self._deadline.cancel()
        self.buffer.end(error)
        self._listener.ended(self._end_report())
        self._dispatcher.ended(self.id)

    def _end_report(self) -> RequestEnd:
        return RequestEnd(
            request=self.request,
            label=self.label,
            stage=self.stage,
            finishes=self.assembly.finishes(),
            num_generated=sum(self.assembly.positions()),
            num_cached=self.num_cached,
            num_bytes_moved=self.num_bytes_moved,
            total_s=self._timers.time() - self._arrived,
            times=self.times,
        )
