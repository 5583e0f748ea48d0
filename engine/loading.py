"""From a model's settings to its weights on a device: the first half of a start.

Knows folders, config.json and kernels; knows nothing of KV memory, steps or requests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine import checkpoint, machine, sizing
from engine.config_file import ConfigFile
from engine.cores import usable_cores
from engine.families import ModelSpec, read_spec
from engine.model import Decoder
from engine.quantisation import Quantisation, Rounding, RoundingSource, StoredSource, read_quantisation
from engine.weights import DummySource, MeasuringSource, SafetensorsSource, WeightSource, stored_dtype
from kernels import dispatch
from kernels.reference import DenseLinear
from kernels.types import Kernels, KernelsUnavailable
from proto.errors import SettingsError
from proto.settings import ModelSettings

log = logging.getLogger(__name__)

_DTYPES = {"float": "float32", "half": "float16"}


@dataclass(frozen=True, slots=True)
class FoundModel:
    """What is known before any weight is read. ``quantisation`` None: weights are taken as they are."""

    settings: ModelSettings
    device: torch.device
    folder: Path
    tokenizer_folder: Path
    config: ConfigFile
    spec: ModelSpec
    quantisation: Quantisation | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be run. ``digest`` names it, ``numerics`` all that decides the last bits of its results."""

    decoder: Decoder
    digest: str
    numerics: str


def find_model(settings: ModelSettings) -> FoundModel:
    """Finds (or fetches) the files and reads config.json. Sets torch's number of threads.

    Raises SettingsError, CheckpointError or UnsupportedModel.
    """
    device = _device(settings.device)
    _set_threads(settings.threads, device)
    folder = checkpoint.locate(settings)
    tokenizer_folder = checkpoint.locate_tokenizer(settings, folder)
    config = ConfigFile.load(folder / "config.json")
    spec = read_spec(config)
    quantisation = read_quantisation(config, settings)
    dtype = _dtype(settings, config, folder)
    return FoundModel(settings, device, folder, tokenizer_folder, config, spec, quantisation, dtype)


def choose_kernels(found: FoundModel, *, has_fp8_kv: bool = False) -> Kernels:
    """Raises SettingsError where --batch-invariant, --attention-backend or fp8 keys and values ask for what there is
    not."""
    wish = found.settings.attention_backend
    task = dispatch.Task(found.device, found.dtype, found.spec.head_dim, wish, has_fp8_kv)
    if not found.settings.batch_invariant:
        try:
            return dispatch.choose(task)
        except KernelsUnavailable as reason:
            raise SettingsError(f"attention_backend {wish}: {reason}.", param="attention_backend") from reason
    try:
        return dispatch.choose_batch_invariant(task)
    except KernelsUnavailable as reason:
        raise SettingsError(f"batch_invariant needs kernels of its own: {reason}.", param="batch_invariant") from reason


def load_weights(found: FoundModel, kernels: Kernels) -> LoadedModel:
    """Reads the weights, and rounds them where they are to be. Raises CheckpointError or DoesNotFit."""
    source = _source(found)
    weights = _describe(found.quantisation, kernels, found.dtype)
    _check_weights_fit(found.spec, source, weights, kernels, found.device)
    decoder = Decoder(found.spec, source, kernels, found.device)
    return LoadedModel(decoder, source.digest(repr(found.spec)), _numerics(found.device, kernels, weights))


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


def _source(found: FoundModel) -> WeightSource:
    """Random weights are plain: ``read_quantisation`` has seen to it."""
    quantisation = found.quantisation
    if found.settings.load_format == "dummy":
        plain: WeightSource = DummySource(found.settings.seed or 0, found.dtype, found.device)
    else:
        plain = stored = SafetensorsSource(found.folder, found.dtype, found.device)
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


def _numerics(device: torch.device, kernels: Kernels, weights: str) -> str:
    """Batch-invariant kernels give the same on any number of threads."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    if kernels.is_batch_invariant:
        threads = " batch-invariant"
    return f"{kernels.name}; torch {torch.__version__}; {machine.instruction_set(device)}{threads}; {weights}"
