"""What kernels are given and give: the seam between a model and its implementations of the maths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.quantised import Matrix, Product


class Linear(Protocol):
    """A matrix ``[out, in]`` with an optional bias ``[out]``, in whatever order its kernel likes."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x [tokens, in]`` to ``[tokens, out]``."""

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding: ``index [tokens]`` to ``[tokens, in]``."""


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Tokens ``start`` to ``end - 1`` of a step belong to one sequence, the first of them at ``position``."""

    start: int
    end: int
    position: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """Which tokens of a step belong to which sequence, and where each sequence's KV lies. Tensors are int64.

    The first ``num_decode`` rows have one token each; ``chunks`` are the others. ``query_starts [rows + 1]``: where
    each row's tokens begin; ``positions [rows]``: the position of its first one; ``block_table [rows, width]``: its
    blocks, padded with any valid one. The first ``decode_width`` columns hold all blocks of the decode rows.
    """

    query_starts: Tensor
    positions: Tensor
    block_table: Tensor
    num_decode: int
    decode_width: int
    chunks: tuple[ChunkSpan, ...]


@dataclass(frozen=True, slots=True)
class PagedKv:
    """KV memory of one worker; only the first stride of a tensor says how far apart blocks lie.

    ``data [num_blocks, num_layers, 2, block_size, kv_heads, head_dim]``: keys at index 0 of the third dimension, values
    at 1. Where it is float8_e4m3fn, ``scales [num_blocks, num_layers, 2, kv_heads, block_size]`` (float32) has a factor
    for each token and head: what is stored is the number divided by it.
    """

    data: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where each token of a step stands: the angles its heads are turned by, and the slot of its keys and values.

    ``cos``, ``sin``: float32 ``[tokens, 1, head_dim]``, the first half of ``sin`` negated already. ``blocks``,
    ``offsets``: int64 ``[tokens]``.
    """

    cos: Tensor
    sin: Tensor
    blocks: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Root-mean-square norms of single heads: ``weight [heads + kv_heads, head_dim]``, of queries and then keys."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How a layer weighs the tokens before: softmax of ``scale * query @ key``.

    With a ``window`` a token sees itself and the window - 1 tokens before it. With a ``soft_cap`` c, a score s becomes
    c * tanh(s / c).
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class DrawRules:
    """How one token is chosen from each row of scores; every list has an entry per row.

    A ``temperature`` of 0 takes the likeliest token, and the row's other rules do not count. ``min_p`` 0, ``top_k`` 0
    or beyond the vocabulary, and ``top_p`` 1 cut off nothing. ``keys``: of the noise, as ``kernels.noise.draw_key``.
    """

    temperature: Sequence[float]
    min_p: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    keys: Sequence[int]

    def __len__(self) -> int:
        return len(self.temperature)

    @property
    def random_rows(self) -> list[int]:
        return [row for row, temperature in enumerate(self.temperature) if temperature > 0]

    def of(self, rows: Sequence[int]) -> DrawRules:
        """The rules of these rows alone."""
        return DrawRules(
            [self.temperature[row] for row in rows],
            [self.min_p[row] for row in rows],
            [self.top_k[row] for row in rows],
            [self.top_p[row] for row in rows],
            [self.keys[row] for row in rows],
        )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a step; each has the signature, shapes and meaning of its namesake in ``kernels.reference``.

    ``name`` goes into a worker's numerics id.
    """

    name: str
    linear: Callable[[Sequence[Tensor], Tensor | None], Linear]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    rotate_and_write: Callable[[Tensor, HeadNorm | None, Places, PagedKv, int], Tensor]
    gate: Callable[[Tensor, str], Tensor]
    attend: Callable[[Tensor, PagedKv, int, Ragged, AttentionSpec], Tensor]
    draw: Callable[[Tensor, DrawRules], Tensor]
    quantised: Callable[[Sequence[Matrix], Tensor | None], Product] | None = None
    """As ``linear``, of quantised weights. None: they are dequantised when they are loaded, for ``linear``."""
    is_capturable: bool = False
    """A captured graph of them may be replayed on other numbers: attention finds lengths on the device, within the
    table's width, and nothing waits for the host."""
    is_batch_invariant: bool = False
    """A row's results have the same bits in any batch, and however its prompt is cut into chunks."""


class KernelsUnavailable(Exception):
    """Compiled kernels cannot be had here; the message says why."""
