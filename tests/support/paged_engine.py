"""A runner whose "model" is a hash of the token history, read back through a fake paged memory.

The memory holds token ids where a real one holds keys and values. The next token depends on every cell that the block
table leads to, so a wrong table, a block given to two owners, a stale prefix match or a forgotten copy changes it.
``oracle`` says what the tokens should be from (prompt, seed, position) alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from engine.batch import Row, Sampled, SampleSpec, StepBatch, StepResult
from engine.facts import EngineFacts
from proto.ids import BlockId, RequestId
from proto.layout import KvLayout
from proto.request import FinishReason, Request, SamplingParams, TokenOut, derive_seed

VOCAB = 16
EOS = 0
STOP = 1
ZERO = -1
UNWRITTEN = -2
GARBAGE = -3


def make_facts(
    num_blocks: int = 32,
    block_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    long_prefill_token_threshold: int = 0,
) -> EngineFacts:
    layout = KvLayout(num_layers=1, block_size=block_size, kv_heads=1, head_dim=8, dtype="float32", model_digest="fake")
    return EngineFacts(
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        long_prefill_token_threshold=long_prefill_token_threshold,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        numerics="fake",
        device="cpu",
    )


def make_request(
    name: str,
    prompt: Sequence[int],
    *,
    n: int = 1,
    max_tokens: int | None = 8,
    seed: int = 7,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] | None = None,
    priority: int = 0,
    salt: str = "",
    forced: tuple[tuple[int, ...], ...] = (),
) -> Request:
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    return Request(
        id=RequestId(name),
        prompt=tuple(prompt),
        params=params.checked(),
        cache_salt=salt,
        priority=priority,
        forced=forced,
    )


def next_token(history: Sequence[int], seed: int, position: int, suppressed: frozenset[int]) -> int:
    """The model and its sampler in one pure function. Rarely ends a sequence."""
    digest = hashlib.blake2b(repr((tuple(history), seed, position)).encode(), digest_size=16).digest()
    for byte in digest:
        token = byte % VOCAB
        if token in (EOS, STOP) and byte >= 2 * VOCAB:
            token = 2 + byte % (VOCAB - 2)
        if token not in suppressed:
            return token
    return VOCAB - 1


def oracle(request: Request, choice: int, facts: EngineFacts, num_kv_tokens: int | None = None) -> list[TokenOut]:
    """Everything this choice ever generates, forced tokens not repeated. Shares no code with the engine."""
    params = request.params
    limit = facts.max_model_len
    if params.max_tokens is None:
        limit = min(limit, (num_kv_tokens or facts.num_kv_tokens) + 1)
    stops = set(params.stop_token_ids or ())
    forced = request.forced[choice] if request.forced else ()
    output: list[int] = []
    made: list[TokenOut] = []
    while True:
        position = len(output)
        early = position < params.min_tokens
        if position < len(forced):
            token = forced[position]
        else:
            suppressed = frozenset(stops | {EOS}) if early else frozenset()
            history = (*request.prompt, *output)
            token = next_token(history, derive_seed(request.seed, choice), position, suppressed)
        output.append(token)
        finish, stop_token = None, None
        if not early and token == EOS and not params.ignore_eos:
            finish = FinishReason.STOP
        elif not early and token in stops:
            finish, stop_token = FinishReason.STOP, token
        elif len(output) == params.max_tokens or len(request.prompt) + len(output) >= limit:
            finish = FinishReason.LENGTH
        if position >= len(forced):
            made.append(TokenOut(request.id, choice, position, token, None, finish, stop_token))
        if finish is not None:
            return made


class FakeMemory:
    """``cells[block][slot]`` is the token whose keys and values would be there."""

    def __init__(self, facts: EngineFacts) -> None:
        self.block_size = facts.block_size
        self.cells = [[UNWRITTEN] * facts.block_size for _ in range(facts.num_blocks)]

    def zero_tail(self, block: BlockId, num_valid_tokens: int) -> None:
        assert 0 < num_valid_tokens < self.block_size
        self.cells[block][num_valid_tokens:] = [ZERO] * (self.block_size - num_valid_tokens)

    def read(self, table: Sequence[int], num_tokens: int) -> list[int]:
        return [self.cells[table[i // self.block_size]][i % self.block_size] for i in range(num_tokens)]


class FakeRunner:
    """Reads what each row attends to before any row writes, as rows of one forward pass may not rely on each other.

    ``is_late``: a batch runs when its result is asked for, or run_next() is called, as on a device that lags behind;
    otherwise when it is submitted. One that fails leaves ``GARBAGE`` to those that follow its draws, and so does a row
    whose tokens begin with those of one of ``poison``: it has no finite logits.
    """

    def __init__(self, memory: FakeMemory, facts: EngineFacts, *, is_late: bool = False) -> None:
        self.memory = memory
        self.facts = facts
        self.is_late = is_late
        self.batches: list[StepBatch] = []
        self.failures: list[BaseException] = []
        self.late_failures: list[BaseException] = []
        self.poison: list[tuple[int, ...]] = []
        self.on_run = lambda: None
        self._queue: deque[FakeStep] = deque()
        self._draws: list[int] = []

    def submit(self, batch: StepBatch) -> FakeStep:
        self.batches.append(batch)
        self.on_run()
        if self.failures:
            raise self.failures.pop()
        assert 0 < batch.num_tokens <= self.facts.max_num_batched_tokens
        assert len(batch.rows) <= self.facts.max_num_seqs
        assert all(row.start + len(row.tokens) < self.facts.max_model_len for row in batch.rows)
        assert len({copy for _, copy in batch.copies}) == len(batch.copies)
        step = FakeStep(self, batch)
        self._queue.append(step)
        if not self.is_late:
            self.run_next()
        return step

    def run_next(self) -> None:
        """The device gets on by one batch, if there is any."""
        if self._queue:
            step = self._queue.popleft()
            if self.late_failures:
                step.error = self.late_failures.pop()
                self._draws = [GARBAGE] * sum(len(row.samples) for row in step.batch.rows)
                return
            step.sampled = self._compute(step)
            self._draws = [
                drawn.token
                for row, sampled in zip(step.batch.rows, step.sampled, strict=True)
                for drawn in sampled or [Sampled(GARBAGE)] * len(row.samples)
            ]

    def _compute(self, step: FakeStep) -> StepResult:
        cells = self.memory.cells
        for source, copy in step.batch.copies:
            cells[copy][:] = cells[source]
        rows = [
            row if row.follows is None else replace(row, tokens=(self._draws[row.follows],)) for row in step.batch.rows
        ]
        pasts = [self.memory.read(row.block_table, row.start) for row in rows]
        written: set[tuple[int, int]] = set()
        for row in rows:
            self._write(row, written)
        return tuple(
            self._samples([*past, *row.tokens], row, num_outputs)
            for past, row, num_outputs in zip(pasts, rows, step.num_outputs, strict=True)
        )

    def _samples(self, history: list[int], row: Row, num_outputs: list[int]) -> tuple[Sampled, ...] | None:
        if any(tuple(history[: len(poison)]) == poison for poison in self.poison):
            return None
        return tuple(
            self._sample(history, spec, num_output) for spec, num_output in zip(row.samples, num_outputs, strict=True)
        )

    def _write(self, row: Row, written: set[tuple[int, int]]) -> None:
        size = self.memory.block_size
        assert len(row.block_table) == -(-(row.start + len(row.tokens)) // size)
        for index, token in enumerate(row.tokens, row.start):
            cell = (row.block_table[index // size], index % size)
            assert cell not in written, "two rows write the same place"
            written.add(cell)
            self.memory.cells[cell[0]][cell[1]] = token

    def _sample(self, history: list[int], spec: SampleSpec, num_output: int) -> Sampled:
        assert len(history) == len(spec.prompt) + num_output
        assert spec.position == num_output
        return Sampled(next_token(history, spec.seed, spec.position, spec.suppressed))


class FakeStep:
    """A batch that was submitted. ``num_outputs``: tokens that each choice had by then, the one it follows included."""

    def __init__(self, runner: FakeRunner, batch: StepBatch) -> None:
        self.batch = batch
        self.num_outputs = [
            [len(spec.output) + (row.follows is not None) for spec in row.samples] for row in batch.rows
        ]
        self.sampled: StepResult | None = None
        self.error: BaseException | None = None
        self._runner = runner

    def result(self) -> StepResult:
        while self.sampled is None and self.error is None:
            self._runner.run_next()
        if self.sampled is None:
            assert self.error is not None
            raise self.error
        return self.sampled
