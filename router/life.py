"""The life of one request: tries, one after the other, until it ends once.

    place ──▶ try (generation g) ──▶ tokens in order ──▶ FINISHED
      ▲              │
      └── recover ◀──┘ trouble: redirect, restart or resume under generation g + 1; or wait for a worker, then place

Everything here is a reaction: to a worker's message, a lost worker, the client, or a timer. ``recovery`` says what a
trouble calls for, ``search`` finds workers or waits for them, the dispatcher carries messages. Knows no sockets, no
Redis and no text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from proto.control import Failed, FromRouter, Progress, Rejected, RejectReason
from proto.errors import DeadlineExceeded, LocalFault, NotFinite, NoWorker, Overloaded, TandemError, WorkerLost
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import NOT_BEGUN, Stage
from proto.request import Request, TokenOut
from router.assembly import TokenAssembly
from router.attempt import Dispatcher, Listener, Rules, Try
from router.buffer import TokenBuffer
from router.deadlines import Watch
from router.journal import Journal
from router.policy import Candidate, Decision, Tried
from router.recovery import Remedy, Side, Situation, after_loss, after_rejection, error_of, is_nobodys_fault
from router.search import Search
from router.timers import Alarm, Timers

log = logging.getLogger(__name__)


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
        *,
        is_later: bool = False,
    ) -> None:
        self.request = request
        self.buffer = TokenBuffer(rules.max_buffered_tokens, timers, self._cut_off)
        self.assembly = TokenAssembly(request.params.n)
        self.journal = Journal(request, label, listener, timers)
        self._rules = rules
        self._dispatcher = dispatcher
        self._listener = listener
        self._timers = timers
        self.current = Try(request, Generation(0), None, Generation(0), None, local=True)
        self._need: Remedy | None = None
        self._num_faults = 0
        # Where its numbers were not finite: the worker's fault, if another one serves it.
        self._doubted: Epoch | None = None
        # What is under way is not turned away, and neither is a later prompt of what is.
        self._is_under_way = is_later
        self._search = Search(dispatcher, rules, timers, self.wake)
        self._watch = Watch(timers, self._late)
        self._deadline, self._verdict = Alarm(timers), Alarm(timers)

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def stage(self) -> Stage:
        return self.journal.stage

    @property
    def is_over(self) -> bool:
        return self.stage.is_terminal

    @property
    def is_waiting(self) -> bool:
        """Whether it needs a worker and has found none."""
        return self._need is not None

    @property
    def is_refused(self) -> bool:
        """Whether decode workers have no room for its blocks."""
        return self._search.is_refused

    # From the flow: the start, and the ends it can bring about.

    def begin(self, spent_s: float = 0.0) -> None:
        """Places the request and tells its workers; where the last of them left a moment ago, waits for another; and
        where all are full, if it is a later prompt, for its turn. ``spent_s`` of its time is over already.

        Raises NoWorker or Overloaded, and then nothing has happened.
        """
        try:
            decision = self._search.find(self.request, Remedy.RESTART, is_new=True)
        except (NoWorker, Overloaded) as error:
            waits = self._is_under_way if isinstance(error, Overloaded) else self._dispatcher.had_worker_lately()
            if not waits:
                raise
            self._need = Remedy.RESTART
            self._search.wait(error, self.stage)
        else:
            self._start(self.request, decision, keeps_prefill=False)
        self._deadline.set(self._rules.request_timeout_s - spent_s, self._expire)

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
        elif self.current.local or self.current.adopted:
            self._send(self.current.stop((choice,)))

    # From workers.

    def tokens_came(self, epoch: Epoch, generation: Generation, tokens: list[TokenOut]) -> None:
        side = self._admit(epoch, generation)
        if side is None:
            return
        self._note_tokens_from(side)
        accepted, broken = self.assembly.accept_all(tokens)
        if accepted:
            self._listener.tokens_came(accepted, self._timers.time())
            self.buffer.push(accepted)
            self._expect()
        if broken is not None:
            log.error("%s: a worker broke the protocol: %s", self.id, broken)
            self._listener.refused("malformed")
            self._dispatcher.failed_on(epoch)
        if self.assembly.is_complete:
            self._end(Stage.FINISHED, None)
        elif broken is not None:
            self._recover(self._situation().again)

    def progress_came(self, epoch: Epoch, news: Progress) -> None:
        side = self._admit(epoch, news.generation)
        if side is None:
            return
        # What a resume finds cached may be this request's own.
        if (side is Side.PREFILL or self.current.local) and not self.current.request.is_resumed:
            self.journal.num_cached = max(self.journal.num_cached, news.num_cached)
        if side is Side.DECODE and news.stage is Stage.QUEUED and not self.current.local:
            self._verdict.cancel()
            if self.assembly.is_started:
                # It would draw the first token again, and perhaps another than the client has.
                self._resume_on_decode()
                return
            self._send(self.current.go_on_alone())
        if news.stage is Stage.ADOPTED:
            if news.generation != self.current.generation:
                self._listener.refused("stale")  # the worker it speaks of was given up meanwhile
                return
            if side is Side.DECODE:
                self.journal.num_bytes_moved += news.num_bytes
            self._adopted()
        elif not news.stage.is_terminal and news.stage not in (Stage.RECEIVED, Stage.ROUTED):
            self._advance(news.stage)

    def rejected(self, epoch: Epoch, news: Rejected) -> None:
        side = self._admit(epoch, news.generation)
        if side is None:
            return
        if news.generation != self.current.generation:
            self._listener.refused("stale")
            return
        if self.is_waiting:
            if not news.held:
                self._lost_its_blocks()
            return
        self._search.was_rejected(epoch, news)
        remedy = after_rejection(side, news.reason, news.held, self._situation())
        log.info("%s: %s says %s (%s): %s", self.id, epoch, news.reason.value, news.message, remedy.value)
        if remedy is Remedy.REDIRECT and news.reason is RejectReason.REFUSED:
            self._refused(news)
        elif remedy is Remedy.AWAIT_VERDICT:
            self._await_verdict()
        elif remedy is Remedy.NONE:
            self._send(self.current.drop_prefill())
        else:
            blamed = self.current.blamed(epoch, news.reason, remedy)
            if news.reason is RejectReason.UNKNOWN and epoch in blamed:
                self._dispatcher.failed_on(epoch)
            self._search.avoid(blamed)
            self._recover(remedy, counts=not is_nobodys_fault(news.reason))

    def failed(self, epoch: Epoch, news: Failed) -> None:
        """The request cannot be served there. One that others have served so far is tried elsewhere; so is one whose
        numbers are not finite, once: the next worker tells whose fault it is."""
        side = self._admit(epoch, news.generation)
        if side is None or (side is Side.PREFILL and self.current.adopted):
            return
        error = error_of(news, self.stage.value)
        if isinstance(error, LocalFault):
            self._dispatcher.failed_on(epoch)
        is_final = not self.current.request.is_resumed
        if isinstance(error, NotFinite):
            is_final = self._doubted is not None or self._num_faults + 1 >= self._rules.max_attempts
            self._doubted = epoch
        if is_final:
            self.fail(error)
            return
        log.warning("%s: %s cannot go on with it: %s", self.id, epoch, error.message)
        self._search.avoid({epoch})
        if self.is_waiting:
            self._lost_its_blocks()
        else:
            self._recover(after_rejection(side, RejectReason.UNKNOWN, False, self._situation()))

    def worker_lost(self, epoch: Epoch) -> None:
        """This incarnation is gone. Nothing it still sends is admitted."""
        side = self.current.side_of(epoch)
        if self.is_over or side is None:
            return
        if self.is_waiting:
            self._lost_its_blocks()  # only a prefill worker is known to it then
            return
        self.current.lose(side)
        remedy = after_loss(side, self._situation())
        log.info("%s: lost its %s worker in stage %s: %s", self.id, side.value, self.stage.value, remedy.value)
        if remedy is Remedy.AWAIT_VERDICT:
            self._await_verdict()
        elif remedy is not Remedy.NONE:
            self._recover(remedy)

    def worker_back(self, epoch: Epoch) -> None:
        """Its stream broke, and the same incarnation is there again. What was said in between is lost; a decode worker
        says its tokens again, a prefill worker nothing: neither that it holds blocks nor that it knows where to."""
        side = self.current.side_of(epoch)
        if self.is_over or self.is_waiting or side is None:
            return
        if side is Side.DECODE:
            self._send(self.current.attach_again(self.assembly.positions()))
            self._send(self.current.stop(self.assembly.done_choices()))
            self._expect()
        elif self._situation().lacks_first:
            log.info("%s: what its prefill worker said may be lost; it is asked again", self.id)
            self._recover(self._situation().again)
        elif self._situation().prefill_has_blocks:
            log.info("%s: what its prefill worker said may be lost; its blocks are handed over once more", self.id)
            self._recover(Remedy.REDIRECT, counts=False)

    def _await_verdict(self) -> None:
        self._verdict.set(self._rules.verdict_s, partial(self._late, Side.DECODE))

    def _late(self, side: Side | None = None) -> None:
        """A worker was silent for longer than the stage may last: for this request it is lost, and outlawed."""
        if side is None:
            is_first_due = self._situation().lacks_first and self.current.prefill is not None
            side = Side.PREFILL if is_first_due else Side.DECODE
        worker = self.current.prefill if side is Side.PREFILL else self.current.decode
        if self.is_over or self.is_waiting or worker is None:
            return
        log.warning("%s: no news from %s in stage %s; given up there", self.id, worker.worker, self.stage.value)
        self._search.avoid({worker.epoch})
        self._dispatcher.failed_on(worker.epoch)
        self._dispatcher.send(worker, self.current.abort())
        self.worker_lost(worker.epoch)

    # Recovery.

    def wake(self) -> None:
        """A worker came, or a pause is over: tries to place the request again, if it is waiting."""
        if self._need is None or self.is_over:
            return
        remedy = self._need
        request = self.current.next_request(self.request, remedy, self.assembly)
        try:
            decision = self._search.find(request, remedy)
        except (NoWorker, Overloaded) as error:
            self._found_nobody(error)
        else:
            self._need = None
            self._start(request, decision, keeps_prefill=remedy is Remedy.REDIRECT)

    def _found_nobody(self, error: NoWorker | Overloaded) -> None:
        if isinstance(error, Overloaded) and self._need is Remedy.RESTART and not self._is_under_way:
            self.fail(error)
        elif self._need is Remedy.REDIRECT and isinstance(error, Tried) and not self._search.lacks_room:
            self._give_up_blocks()
        elif self._need is Remedy.REDIRECT and isinstance(error, Tried) and self.current.is_relayed:
            self._resume_on_decode()
        else:
            try:
                self._search.wait(error, self.stage)
            except WorkerLost as lost:
                self.fail(lost)

    def _recover(self, remedy: Remedy, *, counts: bool = True) -> None:
        """Lets go of what the remedy does not use, and looks for a worker."""
        self._num_faults += counts
        self._is_under_way |= counts or self.stage not in NOT_BEGUN
        if self._num_faults >= self._rules.max_attempts:
            stage = self.stage.value
            self.fail(WorkerLost(f"given up after {self._num_faults} attempts, the last in stage {stage}", stage=stage))
            return
        self._listener.recovering(remedy)
        self._search.stays_on_decode |= remedy is Remedy.RESUME and self.current.is_relayed
        self._verdict.cancel()
        self._watch.cancel()
        self.assembly.forget_held_back()
        self._send(self.current.leave(keep_prefill=remedy is Remedy.REDIRECT))
        self._need = remedy
        self.wake()

    def _refused(self, news: Rejected) -> None:
        """The decode worker has no room for blocks that are computed: another may have, or the same one later."""
        decode = self.current.decode
        may_ask_on = self._search.had_no_room(decode.epoch if decode else None, news.retry_after_s)
        # What is under way is not turned away: a prompt that is still being computed has its own limit.
        if may_ask_on or not self.assembly.is_started:
            self._recover(Remedy.REDIRECT, counts=False)
        else:
            self._resume_on_decode()

    def _resume_on_decode(self) -> None:
        """There is no room to hand blocks over to, but a decode worker's own queue takes every resume, ahead of new
        work."""
        self._search.stays_on_decode = True
        self._recover(Remedy.RESUME, counts=False)

    def _give_up_blocks(self) -> None:
        """No decode worker gets them from where they are: it is their holder that is cut off."""
        assert self.current.prefill is not None
        self._search.avoid_only(self.current.prefill.epoch)
        self._recover(self._situation().again, counts=False)

    def _lost_its_blocks(self) -> None:
        """While the request waits for a decode worker, its prefill worker has let go of the blocks, or is lost."""
        self.current.prefill = None
        self._search.stays_on_decode |= self.current.is_relayed
        self._need = self._situation().again

    def _start(self, request: Request, decision: Decision, *, keeps_prefill: bool) -> None:
        """The next generation."""
        self.current = self.current.following(request, decision, keeps_prefill=keeps_prefill)
        self.journal.placed(self.current, decision)
        self._advance(Stage.ROUTED)
        self._send(self.current.orders(self._rules.lease_s))
        if request.is_resumed:
            self._send(self.current.stop(self.assembly.done_choices()))

    # Small steps.

    def _situation(self) -> Situation:
        return self.current.situation(self.assembly)

    def _admit(self, epoch: Epoch, generation: Generation) -> Side | None:
        if self.is_over:
            return None
        side = self.current.admits(epoch, generation)
        if side is None:
            self._listener.refused("stale")
        self.current.has_heard_decode |= side is Side.DECODE
        return side

    def _note_tokens_from(self, side: Side) -> None:
        speaker = self.current.decode if side is Side.DECODE else self.current.prefill
        assert speaker is not None
        if side is Side.PREFILL:
            self._advance(Stage.SEALED)
        else:
            if not self.current.local:
                self._adopted()
            self._search.moved_on()
            self._advance(Stage.DECODING)
        if side is Side.DECODE or not self.current.adopted:
            self._search.numerics = speaker.numerics

    def _adopted(self) -> None:
        if self.current.adopted:
            return
        self.current.adopted = True
        self._search.moved_on()
        self._verdict.cancel()
        self._advance(Stage.ADOPTED)
        self._send(self.current.stop(self.assembly.stopped_choices()))

    def _send(self, orders: Iterable[tuple[Candidate, FromRouter]]) -> None:
        for worker, message in orders:
            self._dispatcher.send(worker, message)

    def _cut_off(self) -> None:
        self.buffer.clear()
        self.fail(Overloaded(f"cut off: {self._rules.max_buffered_tokens} tokens were not read in time"))

    def _expire(self) -> None:
        timeout, stage = self._rules.request_timeout_s, self.stage.value
        self.fail(DeadlineExceeded(f"not finished within {timeout:g} s; in stage {stage}", stage=stage))

    def _advance(self, stage: Stage) -> None:
        self.journal.advance(stage, self.current)
        if not stage.is_terminal:
            self._expect()

    def _expect(self) -> None:
        """There was news: the next is due within this stage's limit."""
        if not self.is_waiting:
            self._watch.allow(self.current.limit(self.stage, self.assembly, self._rules.limits))

    def _end(self, stage: Stage, error: TandemError | None) -> None:
        """The one way out. Workers that do not know of the end by themselves are told."""
        if self.is_over:
            return
        self._advance(stage)
        if stage is Stage.FINISHED:
            for worker in self.current.workers():
                self._dispatcher.served_by(worker.epoch)
            if self._doubted is not None:
                self._dispatcher.failed_on(self._doubted)
        decode_knows = (self.current.local or self.current.adopted) and not self.assembly.stopped_choices()
        if not (stage is Stage.FINISHED and decode_knows):
            self._send(self.current.leave(keep_prefill=False))
        self._need = None
        self._search.close()
        for timer in (self._verdict, self._deadline, self._watch):
            timer.cancel()
        self.buffer.end(error)
        self.journal.close(self.assembly)
        self._dispatcher.ended(self.id)
