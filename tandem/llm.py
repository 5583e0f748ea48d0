"""Offline generation: the engine in this process, without tiers, network or event loop.

    prompts ─ checked, all of them ─▶ EngineCore.add ─▶ step, step, ... ─▶ text per choice ─▶ RequestOutput

The same engine, sampler and detokeniser as the served stack, so the same seeds give the same tokens. Not thread-safe.
"""

from __future__ import annotations

import itertools
import logging
import operator
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypedDict, cast

from engine.build import EngineParts, build_core, load_engine_parts
from proto.errors import InvalidRequest
from proto.ids import RequestId
from proto.request import Request, SamplingParams, TokenOut
from router.contract import NewRequest
from router.openai.generation import Choice, Delta
from router.openai.schema import read_conversation
from router.tokenizer import ServedModel
from router.validate import Fields
from router.values import Json, JsonObject
from tandem.builtin_model import with_some_model
from tandem.options import OFFLINE, from_keywords
from tandem.outputs import CompletionOutput, Logprob, RequestOutput

log = logging.getLogger(__name__)


class PromptDict(TypedDict, total=False):
    """One of the two; ids win."""

    prompt: str
    prompt_token_ids: Sequence[int]


Prompt = str | PromptDict | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
TextAndIds = tuple[str | None, tuple[int, ...]]


class LLM:
    """A model in this process. ``close`` (or leaving a ``with`` block) frees its memory.

    ``model`` is a folder or hub name; without one, the small one that is built in. Keyword arguments are the
    settings of ``tandem serve`` (``max_model_len=4096``, ``dtype="bfloat16"``, ``seed=1``, ...); unknown ones raise
    SettingsError, and what does not load raises another SetupError.
    """

    def __init__(self, model: str | None = None, **settings: object) -> None:
        resolved = from_keywords(OFFLINE, {"model": model, **settings})
        for warning in resolved.warnings:
            log.warning("%s", warning)
        engine = with_some_model(resolved.engine())
        self._ignores_priority = engine.scheduler.scheduling_policy == "fcfs"
        self._seeds = random.Random(engine.model.seed or 0)
        self._ids = itertools.count()
        self._parts: EngineParts | None = load_engine_parts(engine)
        # There is nobody to send away: the caller waits for all of them.
        self._core = build_core(self._parts, engine, max_num_queued=sys.maxsize)
        self._model = ServedModel.from_card(
            self._parts.card,
            generation_config=engine.model.generation_config,
            override_generation_config=cast("Mapping[str, Json] | None", engine.model.override_generation_config),
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes each prompt; the outputs are in the prompts' order.

        A prompt is a text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}`` or a list of ids. ``sampling_params``:
        one for all, one per prompt, or None for the model's defaults. Requests without a seed get one from the
        ``seed`` setting, in order. ``use_tqdm``: show progress, on a terminal. ``priority``: one per prompt, the
        lowest first; not with scheduling_policy="fcfs". Raises InvalidRequest before anything is computed.
        """
        texts_and_ids = [self._read_prompt(prompt) for prompt in _as_list(prompts)]
        return self._run(texts_and_ids, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[JsonObject] | Sequence[Sequence[JsonObject]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Json] | None = None,
        chat_template_kwargs: Mapping[str, Json] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several. ``chat_template`` is a template's source, in place of the
        model's; messages are read as the server reads them. Raises InvalidRequest."""
        templates = self._model.templates
        if chat_template is not None:
            templates = templates.replaced(chat_template)
        options: JsonObject = {
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        texts_and_ids: list[TextAndIds] = []
        for messages_of_one in _conversations(messages):
            asked = read_conversation(Fields({**options, "messages": list(messages_of_one)}))
            text = templates.render(
                asked.messages,
                tools=asked.tools,
                add_generation_prompt=asked.add_generation_prompt,
                continue_final_message=asked.continue_final_message,
                variables=asked.variables,
            )
            texts_and_ids.append((text, tuple(self._model.encode(text, add_special_tokens=False))))
        return self._run(texts_and_ids, sampling_params, use_tqdm, None)

    def get_tokenizer(self) -> ServedModel:
        """What turns text to ids and back: ``encode``, ``decode``, ``templates.render``."""
        return self._model

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json)."""
        defaults, plain = self._model.defaults, SamplingParams()
        return SamplingParams(
            temperature=defaults.get("temperature", plain.temperature),
            top_p=defaults.get("top_p", plain.top_p),
            top_k=int(defaults.get("top_k", plain.top_k)),
            min_p=defaults.get("min_p", plain.min_p),
            repetition_penalty=defaults.get("repetition_penalty", plain.repetition_penalty),
        )

    def close(self) -> None:
        """Frees the model's memory. May be called twice."""
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.kv.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read_prompt(self, prompt: Prompt) -> TextAndIds:
        if isinstance(prompt, dict):
            if unknown := prompt.keys() - PromptDict.__annotations__.keys():
                raise InvalidRequest(f"A prompt has no {min(unknown)!r}: give prompt or prompt_token_ids.")
            ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        else:
            ids, text = (None, prompt) if isinstance(prompt, str) else (prompt, None)
        if ids is not None:
            return text, tuple(operator.index(token) for token in ids)  # numpy's numbers become plain ones
        return text, tuple(self._model.encode(text or ""))

    def _run(
        self,
        prompts: Sequence[TextAndIds],
        params: Params,
        shows_progress: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        if self._parts is None:
            raise InvalidRequest("This LLM is closed.")
        per_prompt = _per_prompt(params, len(prompts))
        priorities = [0] * len(prompts) if priority is None else priority
        if len(priorities) != len(prompts):
            raise InvalidRequest(f"{len(priorities)} priorities for {len(prompts)} prompts.", param="priority")
        if any(priorities) and self._ignores_priority:
            raise InvalidRequest('With scheduling_policy="fcfs" every priority must be 0.', param="priority")
        jobs: dict[RequestId, _Job] = {}
        try:
            for (text, ids), given, rank in zip(prompts, per_prompt, priorities, strict=True):
                job = self._new_job(text, ids, given or self.get_default_sampling_params(), rank)
                jobs[job.request.id] = job
                self._core.add(job.request)
            self._step_until_finished(jobs, shows_progress and sys.stderr.isatty())
        finally:
            for request in jobs:  # unfinished only where something was raised
                self._core.abort(request)
        return [job.output() for job in jobs.values()]

    def _new_job(self, text: str | None, ids: tuple[int, ...], params: SamplingParams, priority: int) -> _Job:
        if not ids:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        params = params.checked()
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(64))
        request = Request(id=RequestId(str(next(self._ids))), prompt=ids, params=params, priority=priority)
        return _Job(request, text, self._model)

    def _step_until_finished(self, jobs: Mapping[RequestId, _Job], shows_progress: bool) -> None:
        unfinished = set(jobs)
        while unfinished:
            output = self._core.step()
            for request, num_cached in zip(output.started, output.num_cached, strict=True):
                jobs[request].num_cached = num_cached
            for token in output.tokens:
                job = jobs[token.request]
                if job.take(token):
                    self._core.finish_choice(token.request, token.choice)
                if job.is_finished and token.request in unfinished:
                    unfinished.remove(token.request)
                    if shows_progress:
                        _show_progress(len(jobs) - len(unfinished), len(jobs))


class _Job:
    """One request and what it has so far."""

    def __init__(self, request: Request, text: str | None, model: ServedModel) -> None:
        self.request = request
        self.num_cached = 0
        self._text = text
        self._model = model
        new = NewRequest(prompt=request.prompt, params=request.params)
        self._choices = [Choice(index, model, new) for index in range(request.params.n)]
        self._deltas = [Delta(index) for index in range(request.params.n)]

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self._choices)

    def take(self, token: TokenOut) -> bool:
        """Adds a token. Whether a stop string ended its choice, which the engine cannot know."""
        choice = self._choices[token.choice]
        if choice.is_finished:
            return False
        choice.read(token, self._deltas[token.choice])
        return choice.is_finished and token.finish is None

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.id,
            prompt=self._text,
            prompt_token_ids=list(self.request.prompt),
            outputs=[self._completion(delta) for delta in self._deltas],
            finished=self.is_finished,
            num_cached_tokens=self.num_cached,
        )

    def _completion(self, delta: Delta) -> CompletionOutput:
        wants_logprobs = self.request.params.logprobs is not None
        logprobs = [self._candidates(token) for token in delta.tokens] if wants_logprobs else None
        return CompletionOutput(
            index=delta.index,
            text=delta.text,
            token_ids=[token.token for token in delta.tokens],
            cumulative_logprob=_cumulative(delta.tokens) if wants_logprobs else None,
            logprobs=logprobs,
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )

    def _candidates(self, token: TokenOut) -> dict[int, Logprob]:
        """The chosen token first, then the most likely ones; theirs are ranked from 1."""
        assert token.logprobs is not None, "the engine gives what was asked for"
        made = {token.token: self._logprob(token.token, token.logprobs.logprob, token.logprobs.rank)}
        for rank, (candidate, logprob) in enumerate(token.logprobs.top, start=1):
            made.setdefault(candidate, self._logprob(candidate, logprob, rank))
        return made

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._model.token_text(token))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | dict):
        return [cast(Prompt, prompts)]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(Prompt, prompts)]
    return [cast(Prompt, item) for item in prompts]


def _conversations(messages: Sequence[JsonObject] | Sequence[Sequence[JsonObject]]) -> Iterator[Sequence[JsonObject]]:
    if messages and isinstance(messages[0], Mapping):
        yield cast("Sequence[JsonObject]", messages)
    else:
        yield from cast("Sequence[Sequence[JsonObject]]", messages)


def _per_prompt(params: Params, num_prompts: int) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequest(f"{len(params)} sampling parameters for {num_prompts} prompts.", param="sampling_params")
    return params


def _cumulative(tokens: Sequence[TokenOut]) -> float:
    return sum(token.logprobs.logprob for token in tokens if token.logprobs is not None)


def _show_progress(num_done: int, num_all: int) -> None:
    end = "\n" if num_done == num_all else ""
    print(f"\r{num_done}/{num_all} prompts", end=end, file=sys.stderr, flush=True)
