"""From settings to a model ready to run: find the files, load the weights, size the KV memory, warm up.

The one place that turns wishes (settings) into facts. Each phase is timed and reported, so that a slow start explains
itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine import checkpoint, graphs, machine, sizing
from engine.batch import Row, SampleSpec, StepBatch
from engine.config_file import ConfigFile
from engine.core import EngineCore
from engine.device_runner import DeviceRunner
from engine.facts import EngineFacts
from engine.families import read_eos
from engine.graphs import CudaCapture, DecodeGraphs
from engine.kv_memory import KvMemory
from engine.loading import FoundModel, LoadedModel, choose_kernels, find_model, load_weights
from engine.model import Decoder
from engine.runner import Runner
from proto.control import ModelCard
from proto.errors import SettingsError
from proto.hashing import BlockHasher, hash_key
from proto.ids import RequestId
from proto.layout import FP8, KvLayout
from proto.request import SamplingParams
from proto.settings import EngineSettings

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = (64, 32, 256)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of. Whoever builds it closes ``kv``, last."""

    runner: Runner | DeviceRunner
    kv: KvMemory
    facts: EngineFacts
    card: ModelCard
    hasher: BlockHasher


def build_core(
    parts: EngineParts,
    settings: EngineSettings,
    *,
    max_num_queued: int | None = None,
    on_started: Callable[[RequestId], None] | None = None,
) -> EngineCore:
    """An engine of ``parts``. ``max_num_queued`` overrides the settings' bound."""
    scheduler = settings.scheduler
    return EngineCore(
        parts.runner,
        parts.kv,
        parts.facts,
        parts.hasher,
        enable_prefix_caching=settings.cache.enable_prefix_caching,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        policy=scheduler.scheduling_policy,
        max_num_queued=scheduler.max_num_queued_reqs if max_num_queued is None else max_num_queued,
        runs_ahead=scheduler.async_scheduling and isinstance(parts.runner, DeviceRunner),
        on_started=on_started,
    )


class _Phases:
    """Times the steps of the start and tells whoever wants to know."""

    def __init__(self, on_phase: Callable[[str, float], None] | None) -> None:
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        duration_s = time.monotonic() - began
        log.info("Start: %s took %.2f s", name, duration_s)
        if self._on_phase is not None:
            self._on_phase(name, duration_s)


def load_engine_parts(settings: EngineSettings, on_phase: Callable[[str, float], None] | None = None) -> EngineParts:
    """Builds everything one engine needs; ``on_phase(name, seconds)`` hears of each phase as it ends.

    Phases: find, weights, memory, graphs (where decode steps are captured), warmup. Raises SetupError: SettingsError,
    CheckpointError, UnsupportedModel or DoesNotFit, whose messages say what to change.
    """
    phase = _Phases(on_phase)
    with phase("find"):
        found = find_model(settings.model)
        sizing.wanted_length(settings.model.max_model_len, found.spec.max_context)
    with phase("weights"):
        loaded = load_weights(found, choose_kernels(found, has_fp8_kv=_has_fp8_kv(settings)))
    with phase("memory"):
        wanted = sizing.wanted_length(settings.model.max_model_len, found.spec.max_context)
        limits = sizing.step_limits(settings.scheduler, found.device.type, wanted)
        sizes = graphs.plan(settings.model, loaded.decoder.kernels, limits.max_num_seqs)
        facts, kv = _make_memory(settings, found, loaded, limits, sizes)
    captured = None
    if sizes:
        with phase("graphs"):
            captured = _capture(loaded.decoder, kv, facts, sizes)
    runner = _make_runner(loaded.decoder, kv, facts, captured)
    if not settings.model.skip_warmup:
        with phase("warmup"):
            _warm_up(runner, kv, facts)
    card, hasher = _name_model(settings, facts, found)
    return EngineParts(runner, kv, facts, card, hasher)


def _eos(found: FoundModel) -> tuple[int, ...]:
    path = found.folder / "generation_config.json"
    return read_eos(found.config, ConfigFile.load(path) if path.exists() else None)


def _has_fp8_kv(settings: EngineSettings) -> bool:
    return settings.cache.kv_cache_dtype != "auto"


def _make_runner(
    decoder: Decoder, kv: KvMemory, facts: EngineFacts, captured: DecodeGraphs | None
) -> Runner | DeviceRunner:
    if decoder.device.type == "cpu":
        return Runner(decoder, kv, facts)
    return DeviceRunner(decoder, kv, facts, captured)


def _capture(decoder: Decoder, kv: KvMemory, facts: EngineFacts, sizes: Sequence[int]) -> DecodeGraphs:
    """The block behind those that the pool hands out is what padding writes to."""
    try:
        return DecodeGraphs(decoder, kv.paged, facts, sizes, facts.num_blocks, CudaCapture(decoder.device))
    except RuntimeError as error:
        raise SettingsError(
            f"Decode steps cannot be captured as CUDA graphs here: {error}. --enforce-eager does without.",
            param="enforce_eager",
        ) from error


def _make_memory(
    settings: EngineSettings,
    found: FoundModel,
    loaded: LoadedModel,
    limits: sizing.StepLimits,
    graph_sizes: Sequence[int],
) -> tuple[EngineFacts, KvMemory]:
    spec, device = found.spec, found.device
    layout = KvLayout(
        num_layers=spec.num_layers,
        block_size=settings.cache.block_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=FP8 if _has_fp8_kv(settings) else str(found.dtype).removeprefix("torch."),
        model_digest=loaded.digest,
    )
    room = sizing.make_room(
        layout,
        settings.cache,
        limits,
        max_model_len=settings.model.max_model_len,
        max_context=spec.max_context,
        available=_available(settings, found, layout, limits, graph_sizes),
        device=device.type,
    )
    facts = EngineFacts(
        layout=layout,
        num_blocks=room.num_blocks,
        max_model_len=room.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        long_prefill_token_threshold=settings.scheduler.long_prefill_token_threshold,
        vocab_size=spec.vocab_size,
        eos_token_ids=_eos(found),
        numerics=loaded.numerics,
        device=str(device),
    )
    name = device.type.upper() if device.type == "cpu" else "GPU"
    log.info("%s KV cache size: %s tokens (%s)", name, f"{facts.num_kv_tokens:,}", room.reason)
    log.info("Maximum concurrency for %s tokens per request: %.2fx", f"{facts.max_model_len:,}", facts.max_concurrency)
    return facts, KvMemory(layout, room.num_blocks + bool(graph_sizes), device)


def _available(
    settings: EngineSettings,
    found: FoundModel,
    layout: KvLayout,
    limits: sizing.StepLimits,
    graph_sizes: Sequence[int],
) -> int:
    """Bytes for KV memory."""
    spec, device = found.spec, found.device
    if device.type == "cpu":
        return machine.available_memory(device)
    widest = (
        max(3 * spec.intermediate_size, (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim * 3) + 4 * spec.hidden_size
    )
    per_token = widest * found.dtype.itemsize
    step = limits.max_num_batched_tokens * per_token + limits.max_num_seqs * spec.vocab_size * 4 * 6
    step += sizing.graph_bytes(graph_sizes, per_token, layout, spec.max_context, spec.vocab_size)
    return sizing.device_room(machine.device_memory(device), settings.cache.gpu_memory_utilization, step)


def _warm_up(runner: Runner | DeviceRunner, kv: KvMemory, facts: EngineFacts) -> None:
    """One chunk and one decode step, so that libraries choose and compile their kernels before the first request.

    On a GPU with as many tokens as products have kernels of their own for, and again at the end of the longest context:
    there several programs share a row's keys, by other kernels.
    """
    longest = min(facts.max_model_len, facts.num_kv_tokens)
    sizes = [min(size, facts.max_num_batched_tokens, longest) for size in _WARM_UP_TOKENS]
    chunks = [(sizes[0], sizes[0])] if facts.device == "cpu" else [*zip(sizes, sizes, strict=True), (sizes[0], longest)]
    params = SamplingParams(seed=0, temperature=1.0, top_p=0.9)
    samples = (SampleSpec(choice=0, seed=0, position=0, params=params, prompt=(), output=()),)
    for num_tokens, end in chunks:
        start, blocks = end - num_tokens, range(-(-end // facts.block_size))
        runner.run(StepBatch((Row([0] * num_tokens, start, blocks, samples),)))
        runner.run(StepBatch((Row([0], end - 1, blocks, samples),)))
        for block in blocks[start // facts.block_size :]:
            kv.zero_tail(block, 0)


def _name_model(settings: EngineSettings, facts: EngineFacts, found: FoundModel) -> tuple[ModelCard, BlockHasher]:
    name = settings.model.model
    assert name is not None, "a model was located"
    layout = facts.layout
    card = ModelCard(
        model=name,
        served_names=settings.model.served_model_name or (name,),
        digest=layout.model_digest,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        block_size=layout.block_size,
        layout=layout.fingerprint(),
        hash_namespace=layout.fingerprint(),
        files=checkpoint.card_files(found.folder, found.tokenizer_folder),
    )
    return card, BlockHasher(card.hash_namespace, layout.block_size, hash_key(settings.cache.prefix_hash_key))
