"""Compiles the C kernels once and loads them: from this folder's sources, with this machine's C compiler.

The result is kept in a private cache folder under a name that covers sources, flags and compiler, so a new version
never meets an old file. Knows compilers and files; knows nothing of tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kernels.types import KernelsUnavailable

log = logging.getLogger(__name__)

Function = Callable[..., int]

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-Wno-psabi")


@dataclass(frozen=True, slots=True)
class Build:
    """One library. ``isa`` are the processor's features, as Linux names them, that it needs and is compiled for.

    The target is named, not "native": a library compiled elsewhere, into an image say, computes the same.
    """

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    isa: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        """``-mavx512bf16`` for avx512_bf16, but ``-mamx-bf16`` for amx_bf16."""
        avx = [name.replace("_bf16", "bf16") for name in self.isa if not name.startswith("amx")]
        amx = [name.replace("_", "-") for name in self.isa if name.startswith("amx")]
        return [*_FLAGS, *(f"-m{name}" for name in avx + amx)]

    def runs_here(self) -> bool:
        return sys.platform == "linux" and set(self.isa) <= _cpu_flags()


AMX = Build(
    "kernels",
    ("linear.c", "attention.c", "elementwise.c", "noise.c"),
    ("tiles.h", "vector.h"),
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "amx_tile", "amx_bf16"),
)

_ORDERED_ISAS = (("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"), ("avx2", "fma"), ())


def ordered() -> Build:
    """The batch-invariant kernels, for the best instructions that this processor has."""
    isa = next(isa for isa in _ORDERED_ISAS if set(isa) <= _cpu_flags())
    return Build("ordered", ("ordered.c",), (), isa)


def load(build: Build) -> ctypes.CDLL:
    """The compiled kernels. Raises KernelsUnavailable where this machine cannot run or compile them."""
    if not build.runs_here():
        raise KernelsUnavailable("this processor cannot run them")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise KernelsUnavailable("no C compiler found (CC, cc or gcc)")
    try:
        return ctypes.CDLL(str(_compiled(build, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        raise KernelsUnavailable(f"not usable: {reason}") from error


def declare(functions: ctypes.CDLL, name: str, pointers: int, numbers: int, *others: type) -> Function:
    """A C function of so many pointers, then 64-bit numbers, then ``others``."""
    function = functions[name]
    function.argtypes = [c_void_p] * pointers + [c_int64] * numbers + list(others)
    function.restype = c_int
    return cast(Function, function)


def cache_folder() -> Path:
    """Where compiled kernels are kept: TANDEM_CACHE, or the user's cache folder."""
    given = os.environ.get("TANDEM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem"


def _compiled(build: Build, compiler: str) -> Path:
    """The shared library, compiled unless it is there. Two processes may do so at once: the last rename wins."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    digest = hashlib.blake2b(" ".join([version, *build.flags]).encode(), digest_size=8)
    for name in build.sources + build.headers:
        digest.update((_FOLDER / name).read_bytes())
    folder = _private_folder()
    library = folder / f"{build.name}-{digest.hexdigest()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            sources = [str(_FOLDER / name) for name in build.sources]
            subprocess.run(
                [compiler, *build.flags, *sources, "-o", str(made), "-lm"], capture_output=True, check=True, text=True
            )
            made.replace(library)
        log.info("CPU kernels: compiled %s", library)
    return library


def _private_folder() -> Path:
    """The cache folder, or a throw-away one where it cannot be written or is not ours: it holds code we will run."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tandem-kernels-"))


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
