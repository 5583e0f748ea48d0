"""Where a model's tensors come from: safetensors files, mapped and copied once, or seeded random numbers.

Taking a tensor also samples its bytes, so that after loading ``digest`` tells models apart at no extra pass over the
files: every tensor's name, shape and stored type, and up to 256 of its numbers spread evenly over it. What quantised
tensors mean is ``engine.quantisation``'s to know.
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

from kernels.quantised import Matrix
from proto.errors import CheckpointError

_SAMPLES = 256
_POOL = 1_048_573
"""Prime, so that no row length divides it and the rows of a dummy matrix differ."""


class WeightSource(Protocol):
    """Gives tensors by their checkpoint names, in the engine's dtype and on its device."""

    @property
    def dtype(self) -> torch.dtype: ...

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        """The tensors ``names``, which one below the other have ``shape``, for whoever copies them at once: they may
        be views of a file. Raises CheckpointError for a missing tensor or a wrong shape."""

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        """The same as one tensor of its own."""

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        """The weights of linear maps, one or more per module, quantised or as ``parts`` gives them."""

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        """What ``matrices`` would take in memory."""

    def digest(self, essentials: str) -> str:
        """Names the model: of ``essentials``, the dtype and all tensors taken so far. Two quantisations of one
        checkpoint have different names: their KV is not the same."""


class _TensorFile(Protocol):
    """The part of safetensors' reader that is used; it comes without types."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> _TensorHeader: ...


class _TensorHeader(Protocol):
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...


class SafetensorsSource:
    """A checkpoint folder: ``model.safetensors``, shards with an index, or any other ``*.safetensors``."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self.dtype = dtype
        self._device = device
        self._files: dict[str, _TensorFile] = {}
        self._file_of = _locate_tensors(folder)
        self._samples: dict[str, bytes] = {}

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        parts = [self._plain(name) for name in names]
        rows = sum(part.shape[0] for part in parts)
        for name, part in zip(names, parts, strict=True):
            if part.dim() != len(shape) or part.shape[1:] != shape[1:] or rows != shape[0]:
                found = " + ".join(str(list(p.shape)) for p in parts)
                raise CheckpointError(
                    f"{self._folder / self._file_of[name]}: tensor {', '.join(names)} has shape {found}, "
                    f"config.json asks for {list(shape)}."
                )
        return [part.to(self._device, self.dtype) for part in parts]

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        return torch.cat(list(self.parts(names, shape)))

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        return self.parts([f"{module}.weight" for module in modules], shape)

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def digest(self, essentials: str) -> str:
        return _digest(essentials, self.dtype, self._samples)

    # As ``engine.quantisation.scheme.Store``.

    def has(self, name: str) -> bool:
        return name in self._file_of

    def kind(self, name: str) -> str:
        return self._open(name).get_slice(name).get_dtype() if self.has(name) else ""

    def where(self, name: str) -> str:
        return str(self._folder / self._file_of.get(name, ""))

    def stored(self, name: str) -> Tensor:
        return self._mapped(name).to(self._device)

    def plain(self, name: str, columns: int) -> Tensor:
        """A matrix of any number of rows, as ``parts`` gives it."""
        rows = self._open(name).get_slice(name).get_shape()[0]
        return self.parts([name], (rows, columns))[0]

    def _plain(self, name: str) -> Tensor:
        """A tensor of numbers that need nothing to be understood, mapped."""
        tensor = self._mapped(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} is {tensor.dtype}: quantised, which config.json's "
                "quantization_config does not explain."
            )
        return tensor

    def _mapped(self, name: str) -> Tensor:
        """The tensor as it lies in its file. Remembers a sample of it."""
        file = self._open(name)
        try:
            tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.where(name)}: tensor {name} cannot be read: {error}") from error
        self._samples[name] = _sample(tensor)
        return tensor

    def _open(self, name: str) -> _TensorFile:
        """The file that should hold ``name``."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self._folder} has no tensor {name}.{self._instead_of(name)}")
        try:
            if file not in self._files:
                self._files[file] = cast(_TensorFile, safe_open(self._folder / file, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{self._folder} has no file {file}, which should hold {name}.") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: tensor {name} cannot be read: {error}") from error
        return self._files[file]

    def _instead_of(self, name: str) -> str:
        """Why a plain weight may be missing."""
        module = name.removesuffix(".weight")
        found = next((key for key in (f"{module}.qweight", f"{module}.weight_packed") if self.has(key)), None)
        return f" There is {found}, which config.json's quantization_config does not explain." if found else ""


class MeasuringSource:
    """Gives views of a single number, and counts what whole tensors would hold. (Torch's meta device, which is made for
    this, takes seconds to import.)"""

    def __init__(self, dtype: torch.dtype, measured: WeightSource | None = None) -> None:
        """``measured`` says how large matrices are where they are quantised."""
        self.dtype = dtype
        self._measured = measured
        self.num_parameters = 0
        self.all_bytes = 0

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return [self.take(names, shape)]

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        return self._count(shape, math.prod(shape) * self.dtype.itemsize)

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        return [self._count(shape, self.num_bytes(modules, shape))]

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        dense = math.prod(shape) * self.dtype.itemsize
        return dense if self._measured is None else self._measured.num_bytes(modules, shape)

    def _count(self, shape: tuple[int, ...], num_bytes: int) -> Tensor:
        self.num_parameters += math.prod(shape)
        self.all_bytes += num_bytes
        return torch.zeros((), dtype=self.dtype).expand(shape)

    def digest(self, essentials: str) -> str:
        return _digest(essentials, self.dtype, {})


class DummySource:
    """Random tensors that depend on ``seed`` and their names: for trying a shape without its weights.

    Matrices have standard deviation 1.6 / sqrt(fan_in), so that tokens depend on their context; vectors named as a norm
    are ones, other vectors zeros.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._seed = seed
        self.dtype = dtype
        self._device = device
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        self._samples: dict[str, bytes] = {}

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            fill = 1.0 if "norm" in names[0] else 0.0
            out = torch.full(shape, fill, dtype=self.dtype, device=self._device)
        else:
            pool = (self._pool * (1.6 / math.sqrt(shape[-1]))).to(self._device, self.dtype)
            offset = int.from_bytes(hashlib.blake2b(names[0].encode(), digest_size=4).digest()) % _POOL
            out = torch.empty(shape, dtype=self.dtype, device=self._device)
            rolled, flat = pool.roll(offset), out.view(-1)
            for start in range(0, flat.numel(), _POOL):
                part = flat[start : start + _POOL]
                part.copy_(rolled[: part.numel()])
        self._samples[names[0]] = _sample(out)
        return out

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return [self.take(names, shape)]

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        return self.parts([f"{module}.weight" for module in modules], shape)

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def digest(self, essentials: str) -> str:
        return _digest(f"dummy {self._seed} {essentials}", self.dtype, self._samples)


def stored_dtype(folder: Path) -> str | None:
    """The type most weights of a checkpoint have, from its headers; None where it holds no floating point. Scales of
    quantised weights do not count."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for file in sorted(set(_locate_tensors(folder).values())):
        with _open(folder / file) as tensors:
            weights = [name for name in list(tensors.keys()) if name.endswith((".weight", ".bias"))]
            kinds = [tensors.get_slice(name).get_dtype() for name in weights]
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
