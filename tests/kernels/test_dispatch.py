"""Which kernels a task gets, and what it is told where there are none."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, reference
from kernels.dispatch import Task, choose, choose_batch_invariant
from kernels.types import KernelsUnavailable

pytest.importorskip("triton")

from kernels.triton.attention import TritonAttention
from kernels.triton.runtime import Target

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass
class Machine:
    """Pretends that there is a GPU, and that kernels are compiled for it."""

    patch: pytest.MonkeyPatch

    def has_gpu(self, major: int, minor: int) -> None:
        found = SimpleNamespace(major=major, minor=minor, name="a GPU", multi_processor_count=132)
        self.patch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    def has_no_triton(self) -> None:
        real = importlib.util.find_spec
        self.patch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return Machine(monkeypatch)


def test_a_gpu_gets_triton(machine: Machine) -> None:
    machine.has_gpu(9, 0)
    task = Task(CUDA, torch.bfloat16, 128)
    kernels = choose(task)
    assert kernels.name.startswith("triton 3"), "another version may round otherwise"
    assert not kernels.is_batch_invariant
    assert kernels.attend.__self__ == TritonAttention(Target(132, is_interpreted=False))
    assert kernels.linear is reference.linear
    assert kernels.is_capturable
    invariant = choose_batch_invariant(Task(CUDA, torch.float16, 128, has_fp8_kv=True))
    assert invariant.is_batch_invariant
    assert invariant.linear is not reference.linear
    torch_attention = choose(Task(CUDA, torch.bfloat16, 128, attention="torch"))
    assert not torch_attention.is_capturable
    assert torch_attention.attend is reference.attend
    assert torch_attention.name != kernels.name, "results differ in the last bits, so the numerics do"
    assert torch_attention.gate is kernels.gate


@pytest.mark.parametrize(
    ("capability", "head_dim", "has_fp8_kv", "reason"),
    [
        ((7, 5), 128, False, "compute capability 8.0"),
        ((8, 0), 128, True, "8.9.*kv_cache_dtype"),
        ((9, 0), 512, False, "512 dimensions"),
    ],
)
def test_what_triton_cannot_do_torch_does_unless_triton_was_asked_for(
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    head_dim: int,
    has_fp8_kv: bool,
    reason: str,
) -> None:
    machine.has_gpu(*capability)
    assert choose(Task(CUDA, torch.bfloat16, head_dim, "auto", has_fp8_kv)) is dispatch.REFERENCE
    assert "slower" in caplog.text
    with pytest.raises(KernelsUnavailable, match=reason):
        choose(Task(CUDA, torch.bfloat16, head_dim, "triton", has_fp8_kv))
    with pytest.raises(KernelsUnavailable, match=reason):
        choose_batch_invariant(Task(CUDA, torch.bfloat16, head_dim, "auto", has_fp8_kv))


def test_without_triton(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.has_no_triton()
    assert choose(Task(CUDA, torch.bfloat16, 128)) is dispatch.REFERENCE
    assert "not installed" in caplog.text
    with pytest.raises(KernelsUnavailable, match="pip install triton"):
        choose(Task(CPU, torch.float32, 64, attention="triton"))


def test_on_a_cpu(machine: Machine) -> None:
    assert choose(Task(CPU, torch.float32, 64, attention="torch")).attend is reference.attend
    with pytest.raises(KernelsUnavailable, match="not on cpu"):
        choose(Task(CPU, torch.float32, 64, attention="triton"))
    with pytest.raises(KernelsUnavailable, match="depends on the batch"):
        choose_batch_invariant(Task(CPU, torch.float32, 64, attention="torch"))
    machine.patch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in choose(Task(CPU, torch.float32, 64, attention="triton")).name
    interpreted = choose_batch_invariant(Task(CPU, torch.float32, 64, attention="triton"))
    assert interpreted.is_batch_invariant
    assert "interpreted" in interpreted.name
