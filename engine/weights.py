"""Where a model's tensors come from: safetensors files, mapped and copied once, or seeded random numbers.

Taking a tensor also samples its bytes, so that after loading ``digest`` tells models apart at no extra pass over the
files: every tensor's name, shape and stored type, and up to 256 of its numbers spread evenly over it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from proto.errors import CheckpointError

_SAMPLES = 256
_POOL = 1_048_573
"""Prime, so that no row length divides it and the rows of a dummy matrix differ."""


class WeightSource(Protocol):
    """Gives tensors by their checkpoint names, in the engine's dtype and on its device."""

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        """The tensors ``names``, which one below the other have ``shape``, for whoever copies them at once: they may
        be views of a file. Raises CheckpointError for a missing tensor or a wrong shape."""

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """The same as one tensor of its own."""

    def digest(self, essentials: str) -> str:
        """Names the model: of ``essentials``, the dtype and all tensors taken so far."""


class _TensorFile(Protocol):
    """The part of safetensors' reader that is used; it comes without types."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> _TensorHeader: ...


class _TensorHeader(Protocol):
    def get_dtype(self) -> str: ...


class SafetensorsSource:
    """A checkpoint folder: ``model.safetensors``, shards with an index, or any other ``*.safetensors``."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._files: dict[str, _TensorFile] = {}
        self._file_of = _locate_tensors(folder)
        self._samples: dict[str, bytes] = {}

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        parts = [self._stored(name) for name in names]
        rows = sum(part.shape[0] for part in parts)
        for name, part in zip(names, parts, strict=True):
            if part.dim() != len(shape) or part.shape[1:] != shape[1:] or rows != shape[0]:
                found = " + ".join(str(list(p.shape)) for p in parts)
                raise CheckpointError(
                    f"{self._folder / self._file_of[name]}: tensor {', '.join(names)} has shape {found}, "
                    f"config.json asks for {list(shape)}."
                )
        self._samples |= {name: _sample(part) for name, part in zip(names, parts, strict=True)}
        return [part.to(self._device, self._dtype) for part in parts]

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        return torch.cat(list(self.parts(names, shape)))

    def digest(self, essentials: str) -> str:
        return _digest(essentials, self._dtype, self._samples)

    def _stored(self, name: str) -> Tensor:
        """The tensor as it lies in its file, mapped."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self._folder} has no tensor {name}.")
        try:
            if file not in self._files:
                self._files[file] = cast(_TensorFile, safe_open(self._folder / file, framework="pt"))
            tensor = self._files[file].get_tensor(name)
        except FileNotFoundError:
            raise CheckpointError(f"{self._folder} has no file {file}, which should hold {name}.") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: tensor {name} cannot be read: {error}") from error
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{self._folder / file}: tensor {name} is {tensor.dtype}; quantised weights are not supported."
            )
        return tensor


class MeasuringSource:
    """Gives views of a single number, and counts what whole tensors would hold. (Torch's meta device, which is made for
    this, takes seconds to import.)"""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.num_parameters = 0

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return [self.take(names, shape)]

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        self.num_parameters += math.prod(shape)
        return torch.zeros((), dtype=self._dtype).expand(shape)

    def digest(self, essentials: str) -> str:
        return _digest(essentials, self._dtype, {})


class DummySource:
    """Random tensors that depend on ``seed`` and their names: for trying a shape without its weights.

    Matrices have standard deviation 1.6 / sqrt(fan_in), so that tokens depend on their context; vectors named as a norm
    are ones, other vectors zeros.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._seed = seed
        self._dtype = dtype
        self._device = device
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        self._samples: dict[str, bytes] = {}

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            fill = 1.0 if "norm" in names[0] else 0.0
            out = torch.full(shape, fill, dtype=self._dtype, device=self._device)
        else:
            pool = (self._pool * (1.6 / math.sqrt(shape[-1]))).to(self._device, self._dtype)
            offset = int.from_bytes(hashlib.blake2b(names[0].encode(), digest_size=4).digest()) % _POOL
            out = torch.empty(shape, dtype=self._dtype, device=self._device)
            rolled, flat = pool.roll(offset), out.view(-1)
            for start in range(0, flat.numel(), _POOL):
                part = flat[start : start + _POOL]
                part.copy_(rolled[: part.numel()])
        self._samples[names[0]] = _sample(out)
        return out

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return [self.take(names, shape)]

    def digest(self, essentials: str) -> str:
        return _digest(f"dummy {self._seed} {essentials}", self._dtype, self._samples)


def stored_dtype(folder: Path) -> str | None:
    """The type most tensors of a checkpoint have, from its headers; None where it holds no floating point."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for file in sorted(set(_locate_tensors(folder).values())):
        with _open(folder / file) as tensors:
            kinds = [tensors.get_slice(name).get_dtype() for name in list(tensors.keys())]
        known = [kind for kind in kinds if kind in names]
        if known:
            return names[max(set(known), key=known.count)]
    return None


def _locate_tensors(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return dict(json.loads(index.read_bytes())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    single = folder / "model.safetensors"
    others = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    files = [single] if single.exists() else others
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; other weight formats are not supported.")
    located: dict[str, str] = {}
    for path in files:
        with _open(path) as tensors:
            located |= dict.fromkeys(tensors.keys(), path.name)
    return located


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_TensorFile]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield cast(_TensorFile, tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no file {path.name}, which its index names.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return header + chosen.view(torch.uint8).numpy().tobytes()


def _digest(essentials: str, dtype: torch.dtype, samples: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(f"{essentials} {dtype}".encode(), digest_size=16)
    for name in sorted(samples):
        digest.update(f"\n{name} ".encode() + samples[name])
    return digest.hexdigest()
