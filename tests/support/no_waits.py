"""Fails where an operation would make the host wait for a GPU, even though there is none here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = frozenset(
    {
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "unique_consecutive",
        "is_nonzero",
        "equal",
        "bincount",
        "repeat_interleave",
        "argwhere",
        "histc",
    }
)


class NoWaits(TorchDispatchMode):
    """Values on a GPU would have to be known here for these operations; so would they for an index of booleans."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put_", "index_put"):
            indices = [each for each in args[1] if each is not None]
            assert all(each.dtype not in (torch.bool, torch.uint8) for each in indices), "a mask waits for the device"
        return func(*args, **(kwargs or {}))


def without_waits(function: Callable[[], object]) -> Any:
    with NoWaits():
        return function()
