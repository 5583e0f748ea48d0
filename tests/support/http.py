"""A small byte-level tokenizer, a flow that follows a script, and the application on a loopback port."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from aiohttp import ClientSession
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from proto.control import ModelCard
from proto.errors import TandemError
from proto.ids import RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import FinishReason, TokenLogprobs, TokenOut
from proto.settings import RouterSettings
from router.app import build_app
from router.contract import NewRequest, Readiness, StageTimes
from router.tokenizer import ServedModel

CORPUS = [
    "Hello world, how are you today? The quick brown fox jumps over the lazy dog.",
    "Paris is the capital of France. STOP and END are words that stop things.",
    "你好，世界。これはテストです。 naïve café 😀 👩‍👩‍👧 🇫🇷",
] * 4

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@functools.cache
def byte_level_json(vocab_size: int = 400, *, adds_bos: bool = False) -> bytes:
    """tokenizer.json of a byte-level BPE; its merges cut across characters, as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    return tokenizer.to_str().encode()


@functools.cache
def byte_fallback_json() -> bytes:
    """tokenizer.json in the way of Llama 2: spaces as ▁, unknown characters as <0xNN> tokens."""
    words = ["▁Hello", "▁world", "▁", "H", "e", "l", "o", "w", "r", "d", "▁a", "a", ",", "."]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + words:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str().encode()


def model_card(
    files: Mapping[str, bytes] | None = None, *, template: str | None = CHATML, max_model_len: int = 256
) -> ModelCard:
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    all_files = {"tokenizer.json": byte_level_json(), "tokenizer_config.json": json.dumps(config).encode()}
    if template is not None:
        all_files["chat_template.jinja"] = template.encode()
    return ModelCard(
        model="org/tiny",
        served_names=("tiny", "org/tiny-alias"),
        digest="0123456789abcdef",
        max_model_len=max_model_len,
        vocab_size=420,
        eos_token_ids=(1,),
        block_size=16,
        layout="layout",
        hash_namespace="ns",
        files={**all_files, **(files or {})},
    )


def served_model(files: Mapping[str, bytes] | None = None, **kwargs: object) -> ServedModel:
    return ServedModel.from_card(model_card(files, **kwargs))


Step = list[TokenOut] | Exception | asyncio.Event
"""What a stream does next: gives tokens, fails, or waits."""


class ScriptedStream:
    """A RequestStreamLike that does ``steps``. An event waits; what is left after the last step is the end."""

    def __init__(self, steps: Sequence[Step], num_cached: int = 0) -> None:
        self.id = RequestId("epoch.1")
        self.num_cached = num_cached
        self.num_bytes_moved = 4096
        self.prefill_worker = WorkerId("prefill-0")
        self.decode_worker = WorkerId("decode-0")
        self.timings: StageTimes = {Stage.QUEUED: 0.001, Stage.PREFILLING: 0.02}
        self.stopped: list[int] = []
        self.failures: list[TandemError] = []
        self.num_closed = 0
        self.closed = asyncio.Event()
        self.waiting = asyncio.Event()
        self._steps = iter(steps)

    def __aiter__(self) -> AsyncIterator[list[TokenOut]]:
        return self

    async def __anext__(self) -> list[TokenOut]:
        for step in self._steps:
            if isinstance(step, asyncio.Event):
                self.waiting.set()
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                return step
        raise StopAsyncIteration

    def stop_choice(self, choice: int) -> None:
        self.stopped.append(choice)

    def fail(self, error: TandemError) -> None:
        self.failures.append(error)

    async def aclose(self) -> None:
        self.num_closed += 1
        self.closed.set()


@dataclass
class ScriptedFlow:
    """Answers every request with ``script(new)``: steps, or an exception that ``start`` raises."""

    script: Callable[[NewRequest], Sequence[Step] | Exception]
    requests: list[NewRequest] = field(default_factory=list)
    streams: list[ScriptedStream] = field(default_factory=list)
    num_cached: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, new: NewRequest) -> ScriptedStream:
        self.requests.append(new)
        steps = self.script(new)
        if isinstance(steps, Exception):
            raise steps
        stream = ScriptedStream(steps, self.num_cached)
        self.streams.append(stream)
        self.started.set()
        return stream


@dataclass
class FixedModel:
    """A ModelProvider with one model, or with the error that says there is none."""

    model: ServedModel | Exception

    def current(self) -> ServedModel:
        if isinstance(self.model, Exception):
            raise self.model
        return self.model


@dataclass
class RecordedMetrics:
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def exposition(self) -> tuple[bytes, str]:
        return b"up 1\n", "text/plain; version=0.0.4"

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        self.requests.append((handler, method, status))

    def stage(self, name: str, seconds: float) -> None:
        self.stages.append(name)


def tokens_of(
    model: ServedModel,
    text: str,
    *,
    choice: int = 0,
    start: int = 0,
    finish: FinishReason | None = None,
    logprobs: int | None = None,
) -> list[TokenOut]:
    """``text`` as a worker would emit it; ``finish`` goes onto the last token."""
    ids = model.encode(text, add_special_tokens=False)
    last = len(ids) - 1
    scores = None if logprobs is None else TokenLogprobs(-0.5, 1, tuple((k, -0.5 - k) for k in range(logprobs)))
    return [
        TokenOut(RequestId("epoch.1"), choice, start + i, token, scores, finish if i == last else None)
        for i, token in enumerate(ids)
    ]


def saying(
    model: ServedModel, text: str, *, finish: FinishReason = FinishReason.LENGTH
) -> Callable[[NewRequest], list[Step]]:
    """A script: every choice says ``text``, a token at a time."""

    def script(new: NewRequest) -> list[Step]:
        per_choice = [
            tokens_of(model, text, choice=choice, finish=finish, logprobs=new.params.logprobs)
            for choice in range(new.params.n)
        ]
        return [list(batch) for batch in zip(*per_choice, strict=True)]

    return script


@dataclass
class Site:
    """The application, served."""

    base_url: str
    http: ClientSession
    flow: ScriptedFlow
    metrics: RecordedMetrics

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, object], Mapping[str, str]]:
        """(status, JSON, headers)."""
        async with self.http.post(path, json=body, headers=headers) as reply:
            return reply.status, await reply.json(), reply.headers

    async def get(self, path: str, **headers: str) -> tuple[int, dict[str, object], Mapping[str, str]]:
        async with self.http.get(path, headers=headers) as reply:
            return reply.status, await reply.json(), reply.headers

    async def stream(self, path: str, body: Mapping[str, object], **headers: str) -> list[str]:
        """The ``data:`` lines of a streamed answer, without the prefix."""
        async with self.http.post(path, json={**body, "stream": True}, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            text = (await reply.read()).decode()
        frames = text.split("\n\n")
        assert frames.pop() == ""
        assert all(frame.startswith(("data: ", ": ")) for frame in frames)
        return [frame.removeprefix("data: ") for frame in frames if frame.startswith("data: ")]

    async def chunks(self, path: str, body: Mapping[str, object], **headers: str) -> list[dict[str, object]]:
        """A streamed answer's JSON chunks; asserts that [DONE] comes last and once."""
        lines = await self.stream(path, body, **headers)
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


@asynccontextmanager
async def serving(
    flow: ScriptedFlow,
    model: ServedModel | Exception,
    settings: RouterSettings | None = None,
    ready: Readiness | None = None,
    server_root_path: str = "",
) -> AsyncIterator[Site]:
    """The application under uvicorn on a loopback port."""
    metrics = RecordedMetrics()
    readiness = ready or Readiness(ready=True, details={"decode_workers": 1})
    app = build_app(settings or RouterSettings(), flow, FixedModel(model), lambda: readiness, metrics)
    listener = socket.create_server(("127.0.0.1", 0))
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=5, root_path=server_root_path
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with ClientSession(base_url) as http:
            yield Site(base_url, http, flow, metrics)
    finally:
        server.should_exit = True
        await task
        listener.close()
