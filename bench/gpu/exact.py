"""The same bits however a row is computed; the same tokens as plain operations on a CPU give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu.engines import Engine, opened, settings
from bench.gpu.figures import Entry, Figure, Goal
from bench.gpu.lab import Lab
from proto.request import TokenLogprobs, TokenOut
from proto.settings import EngineSettings

_TOP = 10
_ALL = Goal(1.0, of_time=False)
_BUILTIN = Path(__file__).parents[2] / "tandem" / "builtin"
_PROMPTS = 4
_PROMPT = 24
_PREFILLS = 5
_LOGIT_ERROR = Goal(1e-3, is_least=False, of_time=False)


def measure_bits(lab: Lab) -> Iterator[Entry]:
    """With ``--batch-invariant``: alone, among others, as chunks, and taken up in the middle; then what it costs."""
    sizes = lab.sizes
    times = {}
    for is_invariant in (True, False):
        with opened(settings(lab, batch_invariant=is_invariant)) as engine:
            if is_invariant:
                yield from _bits(lab, engine)
            rows = sizes.quantised_batch
            decode = engine.decode_step_s(rows, sizes.context, sizes.num_steps)
            times[is_invariant] = (decode, engine.prefill_s(sizes.prompt, _PREFILLS))
    cases = (f"cost: a decode step of {sizes.quantised_batch}", f"cost: a prompt of {sizes.prompt}")
    for case, fixed, plain in zip(cases, times[True], times[False], strict=True):
        yield Figure(case, fixed * 1e3, "ms", fixed / plain, f"{plain * 1e3:.4g} ms without")


def _bits(lab: Lab, engine: Engine) -> Iterator[Entry]:
    sizes = lab.sizes
    [prompt] = engine.prompts(1, sizes.batch_prompt, seed=5)

    def ask(forced: tuple[int, ...] = ()) -> list[TokenOut]:
        return engine.answers([engine.ask(prompt, sizes.compared, logprobs=_TOP, forced=forced)])[0]

    alone = ask()
    request = engine.ask(prompt, sizes.compared, logprobs=_TOP)
    for number, other in enumerate(engine.prompts(sizes.among, sizes.batch_prompt, seed=6)):
        engine.ask(other, sizes.compared, logprobs=_TOP if number % 2 else None)
    yield _same(f"among {sizes.among} others", alone, engine.answers([request])[0])
    # A prompt before it leaves it half of its own length in the first step.
    [filler] = engine.prompts(1, sizes.batch_tokens - sizes.batch_prompt // 2 - 1, seed=7)
    engine.ask(filler, 1)
    yield _same("its prompt in two chunks", alone, ask())
    half = sizes.compared // 2
    emitted = tuple(token.token for token in alone[:half])
    yield _same("taken up in the middle", alone[half:], ask(emitted))


def _same(case: str, right: Sequence[TokenOut], found: Sequence[TokenOut]) -> Entry:
    """Tokens, and their log probabilities and those of the likeliest others, to the last bit."""
    same = sum(a.token == b.token and a.logprobs == b.logprobs for a, b in zip(right, found, strict=True))
    return Figure(case, len(right), "positions", same / len(right), "with the same bits alone", _ALL)


def measure_tokens(lab: Lab) -> Iterator[Entry]:
    """Greedy tokens in float32, by these kernels on this device and by torch's plain operations on a CPU."""
    shape = settings(lab, dtype="float32")
    builtin = replace(shape, model=replace(shape.model, model=str(_BUILTIN), load_format="auto", max_model_len=256))
    for name, wish in (("the built-in model", builtin), ("the measured shape", shape)):
        yield from _against_cpu(lab, name, _smaller(lab, wish))


def _smaller(lab: Lab, wish: EngineSettings) -> EngineSettings:
    """With room for the few short prompts that a CPU computes."""
    blocks = (_PROMPTS + 1) * (2 + (_PROMPT + lab.sizes.compared) // wish.cache.block_size)
    return replace(wish, cache=replace(wish.cache, num_gpu_blocks_override=max(blocks, 64)))


def _against_cpu(lab: Lab, name: str, wish: EngineSettings) -> Iterator[Entry]:
    wish = replace(wish, model=replace(wish.model, max_model_len=256))
    plain = replace(wish, model=replace(wish.model, device="cpu", attention_backend="torch"))
    answers = []
    for each in (wish, plain):
        with opened(each) as engine:
            prompts = engine.prompts(_PROMPTS, _PROMPT, seed=9)
            requests = [engine.ask(prompt, lab.sizes.compared, logprobs=_TOP) for prompt in prompts]
            answers.append(engine.answers(requests))
    yield from compare(name, *answers)


def compare(name: str, found: Sequence[Sequence[TokenOut]], right: Sequence[Sequence[TokenOut]]) -> Iterator[Entry]:
    """Answers to the same prompts, up to where they part. They may part at a tie: no sum in another order keeps it."""
    num_same, errors, leads = 0, [], {}
    for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.token != b.token:  # what follows it answers another text
                leads[number, position] = _lead(b, a.token)
                break
            num_same += 1
            errors.append(abs(_logprobs(a).logprob - _logprobs(b).logprob))
    total = sum(map(len, right))
    yield Figure(f"{name}: tokens", total, "", num_same / total, "equal up to the first that is not")
    where = "; ".join(f"prompt {number} at {position}: {lead:.2g}" for (number, position), lead in leads.items())
    widest = max(leads.values(), default=0.0)
    of = "how far the right token's logit is above the one taken"
    yield Figure(f"{name}: where tokens part ({where or 'nowhere'})", widest, "widest gap", widest, of, _LOGIT_ERROR)
    if errors:
        case = f"{name}: log probabilities (median {statistics.median(errors):.2g})"
        yield Figure(case, max(errors), "largest difference", max(errors), "absolute", _LOGIT_ERROR)


def _lead(right: TokenOut, token: int) -> float:
    """How far the logit of the right token is above that of ``token``; infinite if that is not among the likeliest."""
    logprobs = _logprobs(right)
    return logprobs.logprob - dict(logprobs.top).get(token, -math.inf)


def _logprobs(token: TokenOut) -> TokenLogprobs:
    assert token.logprobs is not None, "they were asked for"
    return token.logprobs
