"""``tandem bench serve``: warm up, offer the load, report; with a second server, in rounds that take turns.

One machine is never equally fast for minutes on end. So two servers are measured in short rounds, A B B A ..., each
with prompts of its own (no prefix cache knows them) but the same for both, and ratios are shown with their range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import cycle, islice

from bench.client import Server, connect, make_body
from bench.compare import compare
from bench.figures import Figures, figures_of
from bench.load import Run, join, offer
from bench.outcome import Outcome
from bench.report import About, default_filename, table, to_json
from bench.settings import CustomData, Saving, ServeSettings
from bench.vocabulary import PROBE, ids_of_probe, without_asking
from bench.workload import Request, arrival_times, make_requests, read_jsonl
from proto.errors import SettingsError
from router.values import JsonObject


@dataclass(frozen=True, slots=True)
class Prompts:
    """``make`` gives so many requests for a seed; ``source`` says what they are made of."""

    make: Callable[[int, str], list[Request]]
    source: str


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the servers, and the runs it has done."""

    server: Server
    model: str
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender's result: all its rounds as one, and each alone."""

    about: About
    run: Run
    figures: Figures
    rounds: tuple[JsonObject, ...]

    @property
    def result(self) -> JsonObject:
        return to_json(self.about, self.figures, self.run)


async def serve(settings: ServeSettings, say: Callable[[str], object], note: Callable[[str], object]) -> int:
    """Measures and prints; 1 where no request at all succeeded, else 0. ``note`` gets what is not the result.

    Raises NoWorker where a server cannot be reached, UserError where it refuses to say what it serves, SettingsError.
    """
    when = datetime.now()
    if settings.saving is not None:
        _make_folder(settings.saving)  # what cannot be saved is better known before than after
    async with AsyncExitStack() as stack:
        targets = [settings.target, *([] if settings.versus is None else [settings.versus])]
        servers = [await stack.enter_async_context(connect(target)) for target in targets]
        if settings.ready_timeout_s:
            for server in servers:
                await server.ready(settings.ready_timeout_s)
        contenders = [Contender(server, await server.find_model()) for server in servers]
        prompts = await _prompts(settings, contenders[0])
        note(f"Prompts are made of {prompts.source}.")
        await _measure(settings, contenders, prompts, note)
    measured = [_measured(settings, contender, prompts.source, when) for contender in contenders]
    for letter, one in zip("AB", measured, strict=False):
        if len(measured) > 1:
            say(f"{letter}: {one.about.settings.target.base_url}")
        say(table(one.about, one.figures))
    if len(measured) > 1:
        a, b = measured
        say(compare(a.result, b.result, list(zip(a.rounds, b.rounds, strict=True))))
    if settings.saving is not None:
        _save(settings.saving, measured, note)
    return 0 if all(one.figures.completed for one in measured) else 1


async def _prompts(settings: ServeSettings, contender: Contender) -> Prompts:
    """Both servers get the same prompts; where they are made of a server's tokens, of the first one's."""
    dataset = settings.dataset
    if isinstance(dataset, CustomData):
        rows = read_jsonl(dataset.path, dataset.output_len)
        # Rounds go on where the one before ended; a file too short for all starts over.
        remaining = cycle(rows)
        return Prompts(lambda count, _: list(islice(remaining, count)), f"the {len(rows)} of {dataset.path}")
    known = without_asking(settings.tokens, settings.target.backend)
    vocabulary = known or ids_of_probe(await contender.server.tokenize(contender.model, PROBE))
    return Prompts(lambda count, seed: make_requests(dataset, vocabulary, count, seed), vocabulary.source)


async def _measure(
    settings: ServeSettings,
    contenders: Sequence[Contender],
    prompts: Prompts,
    note: Callable[[str], object],
) -> None:
    load = settings.load
    for number in range(settings.num_rounds):
        seed = f"{load.seed} round {number}"
        num_warmups = load.num_warmups if number == 0 else 0
        requests = prompts.make(load.num_prompts + num_warmups, seed)
        measured, warmups = requests[: load.num_prompts], requests[load.num_prompts :]
        arrivals = arrival_times(load, seed)
        # Turns are reversed every round, so that a machine that slowly gets slower is slower for both.
        for contender in contenders[:: -1 if number % 2 else 1]:
            url = contender.server.target.base_url
            if warmups:
                note(f"{url}: {len(warmups)} warm-up requests")
                await _offer(settings, contender, warmups, [0.0] * len(warmups))
            note(f"{url}: {len(measured)} requests for {contender.model}, round {number + 1} of {settings.num_rounds}")
            contender.runs.append(await _offer(settings, contender, measured, arrivals))


async def _offer(
    settings: ServeSettings, contender: Contender, requests: Sequence[Request], arrivals: Sequence[float]
) -> Run:
    backend = settings.target.backend
    bodies = [make_body(request, contender.model, backend, settings.sampling) for request in requests]

    async def send(pair: tuple[bytes, Request]) -> Outcome:
        return await contender.server.send(*pair)

    pairs = list(zip(bodies, requests, strict=True))
    return await offer(pairs, arrivals, send, max_concurrency=settings.load.max_concurrency)


def _measured(settings: ServeSettings, contender: Contender, source: str, when: datetime) -> Measured:
    own = replace(settings, target=contender.server.target)
    about = About(own, contender.model, source, when)
    rounds = tuple(to_json(about, figures_of(run, own.wanted), run) for run in contender.runs)
    run = join(contender.runs)
    return Measured(about, run, figures_of(run, own.wanted), rounds)


def _make_folder(saving: Saving) -> None:
    try:
        saving.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--result-dir {saving.folder}: {error}") from error


def _save(saving: Saving, measured: Sequence[Measured], note: Callable[[str], object]) -> None:
    """Writes one file per server, the second's named ``.versus.json``. Raises SettingsError where it cannot."""
    path = saving.folder / (saving.filename or default_filename(measured[0].about))
    for one, file in zip(measured, [path, path.with_suffix(f".versus{path.suffix}")], strict=False):
        try:
            file.write_text(json.dumps(one.result, indent=2) + "\n")
        except OSError as error:
            raise SettingsError(f"Cannot save the result: {error}") from error
        note(f"Saved {file}")
