"""From settings to a model ready to run: find the files, load the weights, size the KV memory, warm up.

The one place that turns wishes (settings) into facts. Each phase is timed and reported, so that a slow start explains
itself.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine import checkpoint, machine, sizing
from engine.batch import Row, SampleSpec, StepBatch
from engine.config_file import ConfigFile
from engine.core import EngineCore
from engine.cores import usable_cores
from engine.facts import EngineFacts
from engine.families import ModelSpec, read_eos, read_spec
from engine.kv_memory import KvMemory
from engine.model import Decoder
from engine.quantisation import Quantisation, Rounding, RoundingSource, StoredSource, read_quantisation
from engine.runner import Runner
from engine.weights import DummySource, MeasuringSource, SafetensorsSource, WeightSource, stored_dtype
from kernels import dispatch
from kernels.reference import DenseLinear
from kernels.types import Kernels, KernelsUnavailable
from proto.control import ModelCard
from proto.errors import SettingsError
from proto.hashing import BlockHasher, hash_key
from proto.ids import RequestId
from proto.layout import KvLayout
from proto.request import SamplingParams
from proto.settings import EngineSettings, ModelSettings

log = logging.getLogger(__name__)

_DTYPES = {"float": "float32", "half": "float16"}


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of. Whoever builds it closes ``kv``, last."""

    runner: Runner
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

    Phases: find, weights, memory, warmup. Raises SetupError: SettingsError, CheckpointError, UnsupportedModel or
    DoesNotFit, whose messages say what to change.
    """
    phase = _Phases(on_phase)
    with phase("find"):
        device = _device(settings.model.device)
        _set_threads(settings.model.threads, device)
        folder = checkpoint.locate(settings.model)
        tokenizer_folder = checkpoint.locate_tokenizer(settings.model, folder)
        config = ConfigFile.load(folder / "config.json")
        spec = read_spec(config)
        quantisation = read_quantisation(config, settings.model)
        dtype = _dtype(settings.model, config, folder)
        sizing.wanted_length(settings.model.max_model_len, spec.max_context)
    with phase("weights"):
        source = _source(settings.model, quantisation, folder, dtype, device)
        kernels = _kernels(settings.model, spec, device, dtype)
        weights = _describe(quantisation, kernels, dtype)
        _check_weights_fit(spec, source, weights, kernels, device)
        model = Decoder(spec, source, kernels, device)
        digest = source.digest(repr(spec))
    with phase("memory"):
        numerics = _numerics(device, kernels, weights)
        facts, kv = _make_memory(settings, spec, digest, dtype, device, numerics, _eos(folder, config))
        runner = Runner(model, kv, facts)
    if not settings.model.skip_warmup:
        with phase("warmup"):
            _warm_up(runner, kv, facts)
    card, hasher = _name_model(settings, facts, folder, tokenizer_folder)
    return EngineParts(runner, kv, facts, card, hasher)


def _device(wish: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise SettingsError("device is cuda, but torch finds no CUDA device here.", param="device")
    return torch.device("cuda" if has_cuda and wish != "cpu" else "cpu")


def _set_threads(wish: int | None, device: torch.device) -> None:
    """Without a wish, OMP_NUM_THREADS counts, and without that the cores that a container's quota leaves."""
    if wish is not None:
        torch.set_num_threads(wish)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def _dtype(settings: ModelSettings, config: ConfigFile, folder: Path) -> torch.dtype:
    name = _DTYPES.get(settings.dtype, settings.dtype)
    if name == "auto":
        stated = config.text("dtype", config.text("torch_dtype", "")).removeprefix("torch.")
        if not stated and settings.load_format != "dummy":
            stated = stored_dtype(folder) or ""
        name = stated or "float32"
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise SettingsError(f"dtype {name} is not supported; choose {', '.join(dtypes)}.", param="dtype")
    return dtypes[name]


def _source(
    settings: ModelSettings,
    quantisation: Quantisation | None,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> WeightSource:
    """Random weights are plain: ``read_quantisation`` has seen to it."""
    if settings.load_format == "dummy":
        plain: WeightSource = DummySource(settings.seed, dtype, device)
    else:
        plain = stored = SafetensorsSource(folder, dtype, device)
        if quantisation is not None and not isinstance(quantisation, Rounding):
            return StoredSource(stored, quantisation)
    return RoundingSource(plain, quantisation) if isinstance(quantisation, Rounding) else plain


def _describe(quantisation: Quantisation | None, kernels: Kernels, dtype: torch.dtype) -> str:
    """What the weights are, and what becomes of quantised ones here."""
    name = str(dtype).removeprefix("torch.")
    if quantisation is None:
        return name
    if kernels.quantised is None:
        log.info("Weights: %s; multiplied, and kept in memory, as %s", quantisation.describe(), name)
        return f"{name} of {quantisation.describe()}"
    return f"{quantisation.describe()}, the rest {name}"


def _kernels(settings: ModelSettings, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Kernels:
    if not settings.batch_invariant:
        return dispatch.choose(device, dtype)
    try:
        return dispatch.choose_batch_invariant(device, dtype, spec.head_dim)
    except KernelsUnavailable as reason:
        raise SettingsError(f"batch_invariant needs kernels of its own: {reason}.", param="batch_invariant") from reason


def _check_weights_fit(
    spec: ModelSpec, source: WeightSource, weights: str, kernels: Kernels, device: torch.device
) -> None:
    """Builds the model once without its memory: what it takes is counted by the code that takes it."""
    counted = MeasuringSource(source.dtype, source if kernels.quantised is not None else None)
    without_copies = replace(dispatch.REFERENCE, linear=lambda parts, bias: DenseLinear(parts[0], bias))
    Decoder(spec, counted, without_copies, torch.device("cpu"))
    hint = " or choose dtype bfloat16" if source.dtype == torch.float32 else ""
    available = machine.available_memory(device)
    sizing.check_weights(counted.num_parameters, counted.all_bytes, weights, available, str(device), hint)


def _eos(folder: Path, config: ConfigFile) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    return read_eos(config, ConfigFile.load(path) if path.exists() else None)


def _make_memory(
    settings: EngineSettings,
    spec: ModelSpec,
    digest: str,
    dtype: torch.dtype,
    device: torch.device,
    numerics: str,
    eos: tuple[int, ...],
) -> tuple[EngineFacts, KvMemory]:
    layout = KvLayout(
        num_layers=spec.num_layers,
        block_size=settings.cache.block_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        model_digest=digest,
    )
    wanted = sizing.wanted_length(settings.model.max_model_len, spec.max_context)
    limits = sizing.step_limits(settings.scheduler, device.type, wanted)
    room = sizing.make_room(
        layout,
        settings.cache,
        limits,
        max_model_len=settings.model.max_model_len,
        max_context=spec.max_context,
        available=_available(settings, spec, limits, dtype, device),
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
        eos_token_ids=eos,
        numerics=numerics,
        device=str(device),
    )
    name = device.type.upper() if device.type == "cpu" else "GPU"
    log.info("%s KV cache size: %s tokens (%s)", name, f"{facts.num_kv_tokens:,}", room.reason)
    log.info("Maximum concurrency for %s tokens per request: %.2fx", f"{facts.max_model_len:,}", facts.max_concurrency)
    return facts, KvMemory(layout, room.num_blocks, device)


def _available(
    settings: EngineSettings, spec: ModelSpec, limits: sizing.StepLimits, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes for KV memory. On a GPU: the share of the whole device, less what is in use and what a step needs."""
    free = machine.available_memory(device)
    if device.type == "cpu":
        return free
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    widest = (
        max(3 * spec.intermediate_size, (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim * 3) + 4 * spec.hidden_size
    )
    step = limits.max_num_batched_tokens * widest * dtype.itemsize + limits.max_num_seqs * spec.vocab_size * 4 * 6
    return max(0, int(total * settings.cache.gpu_memory_utilization) - (total - free) - step)


def _numerics(device: torch.device, kernels: Kernels, weights: str) -> str:
    """Batch-invariant kernels give the same on any number of threads."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    if kernels.is_batch_invariant:
        threads = " batch-invariant"
    return f"{kernels.name}; torch {torch.__version__}; {machine.instruction_set(device)}{threads}; {weights}"


def _warm_up(runner: Runner, kv: KvMemory, facts: EngineFacts) -> None:
    """One chunk and one decode step, so that libraries choose and compile their kernels before the first request."""
    num_tokens = min(64, facts.max_num_batched_tokens, facts.max_model_len, facts.num_kv_tokens)
    blocks = range(-(-num_tokens // facts.block_size))
    params = SamplingParams(seed=0, temperature=1.0, top_p=0.9)
    samples = (SampleSpec(choice=0, seed=0, position=0, params=params, prompt=(), output=()),)
    runner.run(StepBatch((Row([0] * num_tokens, 0, blocks, samples),)))
    runner.run(StepBatch((Row([0], num_tokens - 1, blocks, samples),)))
    for block in blocks:
        kv.zero_tail(block, 0)


def _name_model(
    settings: EngineSettings, facts: EngineFacts, folder: Path, tokenizer_folder: Path
) -> tuple[ModelCard, BlockHasher]:
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
        files=checkpoint.card_files(folder, tokenizer_folder),
    )
    return card, BlockHasher(card.hash_namespace, layout.block_size, hash_key(settings.cache.prefix_hash_key))
