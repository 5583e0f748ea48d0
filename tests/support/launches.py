"""Notes what a Triton kernel would be given, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Launches:
    """In a kernel's place. ``tensors``: of each launch, in order."""

    tensors: list[list[Tensor]] = field(default_factory=list)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.tensors.append([arg for arg in args if isinstance(arg, Tensor)])

        return launch

    @property
    def are_aligned(self) -> bool:
        """Whether all begin at 16 bytes of their memory: else Triton compiles the kernel again."""
        return all(
            tensor.storage_offset() * tensor.element_size() % 16 == 0 for launch in self.tensors for tensor in launch
        )
