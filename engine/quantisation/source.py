"""Where a model's matrices come from when they are quantised: a ``WeightSource`` in front of another one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from engine.quantisation.rounding import Rounding
from engine.quantisation.scheme import Scheme
from engine.weights import SafetensorsSource, WeightSource
from kernels.quantised import Matrix
from proto.errors import CheckpointError

_KEPT = "lm_head"
"""Is not rounded, as in vLLM: it decides the tokens."""


class RoundingSource:
    """Plain weights, rounded one fused matrix at a time. The digest names the plain ones and the rounding, so that
    workers agree on it whatever device rounded."""

    def __init__(self, inner: WeightSource, rounding: Rounding) -> None:
        self.dtype = inner.dtype
        self._inner = inner
        self._rounding = rounding

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return self._inner.parts(names, shape)

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        return self._inner.take(names, shape)

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        plain = self._inner.matrices(modules, shape)
        if _KEPT in modules:
            return plain
        return [self._rounding.round(part) if isinstance(part, Tensor) else part for part in plain]

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        return self._inner.num_bytes(modules, shape) if _KEPT in modules else self._rounding.num_bytes(*shape)

    def digest(self, essentials: str) -> str:
        return f"{self._inner.digest(f'{essentials} {self._rounding.describe()}')}-{self._rounding.name}"


class StoredSource:
    """A checkpoint whose linear maps are stored as ``scheme`` says, but for those it holds plain."""

    def __init__(self, store: SafetensorsSource, scheme: Scheme) -> None:
        self.dtype = store.dtype
        self._store = store
        self._scheme = scheme
        self._num_quantised = 0

    def parts(self, names: Sequence[str], shape: tuple[int, ...]) -> Sequence[Tensor]:
        return self._store.parts(names, shape)

    def take(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
        return self._store.take(names, shape)

    def matrices(self, modules: Sequence[str], shape: tuple[int, int]) -> Sequence[Matrix]:
        found = [self._matrix(module, shape[1]) for module in modules]
        if sum(matrix.shape[0] for matrix in found) != shape[0]:
            sizes = " + ".join(str(list(matrix.shape)) for matrix in found)
            raise CheckpointError(f"{', '.join(modules)} have {sizes}; config.json asks for {list(shape)}.")
        return found

    def num_bytes(self, modules: Sequence[str], shape: tuple[int, int]) -> int:
        """As if the modules shared the rows evenly, which matters only where some of them are plain."""
        rows, columns = math.ceil(shape[0] / len(modules)), shape[1]
        return sum(
            self._scheme.num_bytes(module, rows, columns)
            if self._scheme.covers(self._store, module)
            else self._store.num_bytes([module], (rows, columns))
            for module in modules
        )

    def digest(self, essentials: str) -> str:
        """Raises CheckpointError where not one matrix was quantised: config.json is of another checkpoint."""
        if not self._num_quantised:
            raise CheckpointError(
                f"config.json says {self._scheme.describe()}, but no weights are stored so. Where they are plain, take "
                "quantization_config out of config.json."
            )
        return f"{self._store.digest(f'{essentials} {self._scheme!r}')}-{self._scheme.name}"

    def _matrix(self, module: str, columns: int) -> Matrix:
        if not self._scheme.covers(self._store, module):
            return self._store.plain(f"{module}.weight", columns)
        self._num_quantised += 1
        return self._scheme.matrix(self._store, module, columns)
