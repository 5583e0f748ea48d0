"""Tokens to text for one HTTP request: one or more prompts, each with n choices, merged as they come.

    RequestStreamLike ─list[TokenOut]─▶ Choice (detokenise, stop strings) ─Delta─▶ completions / chat

Knows text and the routing contract; knows neither JSON shapes nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from proto.errors import LocalFault, TandemError
from proto.ids import WorkerId
from proto.request import FinishReason, SamplingParams, TokenOut
from router.contract import FlowLike, NewRequest, RequestStreamLike
from router.detokenizer import StopMatcher
from router.tokenizer import ServedModel


@dataclass(slots=True)
class Delta:
    """What one choice gained. ``index`` is the choice's in the response; ``finish`` is set on its last delta."""

    index: int
    text: str = ""
    tokens: list[TokenOut] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None


class Choice:
    """The text of one choice of one prompt."""

    def __init__(self, index: int, model: ServedModel, new: NewRequest) -> None:
        params = new.params
        self.index = index
        self.num_tokens = 0
        self.is_finished = False
        self._min_tokens = params.min_tokens
        self._shows_stop_token = params.include_stop_str_in_output
        self._detokenizer = model.detokenizer(new.prompt, skip_special_tokens=params.skip_special_tokens)
        stops = params.stop_strings
        self._matcher = StopMatcher(stops, include=params.include_stop_str_in_output) if stops else None

    def read(self, out: TokenOut, delta: Delta) -> None:
        """Adds one token to ``delta``. Raises TandemError when the token says that generation failed."""
        if out.finish is FinishReason.ERROR:
            raise TandemError("Generation failed on the worker.", stage="decoding")
        self.num_tokens += 1
        delta.tokens.append(out)
        hides_token = out.finish is FinishReason.STOP and not self._shows_stop_token
        text = "" if hides_token else self._detokenizer.push(out.token)
        if out.finish is not None:
            text += self._detokenizer.flush()
        if self._matcher is not None:
            text = self._match(text, delta)
        delta.text += text
        if out.finish is not None and delta.finish is None:
            delta.text += self._matcher.flush() if self._matcher is not None else ""
            delta.finish, delta.stop_reason = out.finish.value, out.stop_token
        self.is_finished = delta.finish is not None

    def _match(self, text: str, delta: Delta) -> str:
        assert self._matcher is not None
        text, stop = self._matcher.push(text, armed=self.num_tokens > self._min_tokens)
        if stop is not None:
            delta.finish, delta.stop_reason = FinishReason.STOP.value, stop
        return text


class Answer:
    """One prompt's stream and its choices. ``first_index`` is the index of its choice 0 in the response."""

    def __init__(self, stream: RequestStreamLike, model: ServedModel, new: NewRequest, first_index: int) -> None:
        self.stream = stream
        self.new = new
        self.detokenize_s = 0.0
        self._choices = [Choice(first_index + i, model, new) for i in range(new.params.n)]

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self._choices)

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    async def next(self) -> list[Delta]:
        """What the next batch of tokens adds, one delta per choice at most; empty if all of it came too late."""
        try:
            batch = await anext(self.stream)
        except StopAsyncIteration:
            raise LocalFault("A stream ended before its choices did.") from None
        start = time.perf_counter()
        deltas: dict[int, Delta] = {}
        for out in batch:
            choice = self._choices[out.choice]
            if choice.is_finished:
                continue
            choice.read(out, deltas.setdefault(out.choice, Delta(choice.index)))
            if choice.is_finished and out.finish is None:
                self.stream.stop_choice(out.choice)
        self.detokenize_s += time.perf_counter() - start
        return list(deltas.values())


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    """All prompts of one HTTP request, running. Whoever started it calls ``aclose``, whatever happened.

    Index of a choice: prompt index * n + choice, as OpenAI counts.
    """

    def __init__(self, answers: Sequence[Answer], started: float) -> None:
        self._answers = tuple(answers)
        self._waiting: dict[asyncio.Task[list[Delta]], Answer] = {}
        self._started = started
        self.first_token_s: float | None = None

    @classmethod
    async def start(cls, flow: FlowLike, model: ServedModel, requests: Sequence[NewRequest]) -> Generation:
        """Starts every prompt; if one cannot start, none does. Raises what ``FlowLike.start`` raises.

        Others run between two of them, since many take long together; if it is cancelled there, none goes on. There
        may be more of them than workers' queues have places: the later ones wait for their turn.
        """
        answers: list[Answer] = []
        begun = time.monotonic()
        try:
            for new in requests:
                if answers:
                    await asyncio.sleep(0)
                stream = await flow.start(replace(new, is_later=bool(answers)))
                answers.append(Answer(stream, model, new, len(answers) * new.params.n))
        except BaseException as error:
            started = cls(answers, begun)
            if isinstance(error, Exception):
                started.fail(error)
            await started.aclose()
            raise
        return cls(answers, begun)

    @property
    def params(self) -> SamplingParams:
        return self._answers[0].new.params

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [answer.new.prompt for answer in self._answers]

    @property
    def usage(self) -> Usage:
        """As of now."""
        return Usage(
            prompt_tokens=sum(len(answer.new.prompt) for answer in self._answers),
            completion_tokens=sum(answer.num_tokens for answer in self._answers),
            cached_tokens=sum(answer.stream.num_cached for answer in self._answers),
        )

    @property
    def detokenize_s(self) -> float:
        return sum(answer.detokenize_s for answer in self._answers)

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def num_bytes_moved(self) -> int:
        return sum(answer.stream.num_bytes_moved for answer in self._answers)

    @property
    def workers(self) -> tuple[list[WorkerId], list[WorkerId]]:
        """The prefill and the decode workers that took part, each named once."""
        streams = [answer.stream for answer in self._answers]
        prefill = dict.fromkeys(stream.prefill_worker for stream in streams if stream.prefill_worker is not None)
        decode = dict.fromkeys(stream.decode_worker for stream in streams if stream.decode_worker is not None)
        return list(prefill), list(decode)

    def stage_times(self) -> dict[str, float]:
        """Seconds per stage; with several prompts, of the slowest one in each stage."""
        times: dict[str, float] = {}
        for answer in self._answers:
            for stage, seconds in answer.stream.timings.items():
                times[stage.value] = max(times.get(stage.value, 0.0), seconds)
        return times

    async def next(self) -> list[Delta]:
        """What has come, at least one delta; empty once every choice is finished. Raises TandemError."""
        while not all(answer.is_finished for answer in self._answers):
            try:
                batch = await (self._answers[0].next() if len(self._answers) == 1 else self._next_of_many())
            except Exception as error:
                self.fail(error)
                raise
            if batch:
                if self.first_token_s is None:
                    self.first_token_s = self.total_s
                return batch
        return []

    async def collect(self) -> list[Delta]:
        """Everything, one delta per choice in order of index. Raises TandemError."""
        whole = [Delta(i) for i in range(len(self._answers) * self.params.n)]
        while batch := await self.next():
            for delta in batch:
                target = whole[delta.index]
                target.text += delta.text
                target.tokens += delta.tokens
                target.finish, target.stop_reason = delta.finish, delta.stop_reason
        return whole

    async def _next_of_many(self) -> list[Delta]:
        """What any of the unfinished answers has next."""
        busy = set(self._waiting.values())
        for answer in self._answers:
            if not answer.is_finished and answer not in busy:
                self._waiting[asyncio.ensure_future(answer.next())] = answer
        done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._waiting[task]
        return [delta for task in done for delta in task.result()]

    def fail(self, error: Exception) -> None:
        """One prompt has met ``error``, and so have they all: they are one answer."""
        reason = error if isinstance(error, TandemError) else LocalFault("another prompt of this answer failed")
        for answer in self._answers:
            answer.stream.fail(reason)

    async def aclose(self) -> None:
        """Aborts whatever is unfinished. Idempotent."""
        waiting, self._waiting = list(self._waiting), {}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        results = await asyncio.gather(*(answer.stream.aclose() for answer in self._answers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
