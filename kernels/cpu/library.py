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
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("linear.c", "attention.c", "elementwise.c", "noise.c")
_HEADERS = ("tiles.h", "vector.h")
_ISA = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "amx_tile", "amx_bf16")
_TARGET = [f"-m{name.replace('_bf16', 'bf16') if name.startswith('avx') else name.replace('_', '-')}" for name in _ISA]
_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", *_TARGET]
"""The target is named, not "native": a library compiled elsewhere, into an image say, computes the same."""


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None, with the reason logged, where this machine cannot run or compile them."""
    if sys.platform != "linux" or not set(_ISA) <= _cpu_flags():
        log.info("CPU kernels: none for this processor (they need AMX); using torch")
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        log.warning(
            "CPU kernels: no C compiler found (CC, cc or gcc); using torch, which decodes at about half the speed"
        )
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("CPU kernels: not usable, using torch: %s", reason)
        return None
    if not library.allow_tiles():
        log.info("CPU kernels: the system does not allow AMX to this process; using torch")
        return None
    return library


def cache_folder() -> Path:
    """Where compiled kernels are kept: TANDEM_CACHE, or the user's cache folder."""
    given = os.environ.get("TANDEM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem"


def _compiled(compiler: str) -> Path:
    """The shared library, compiled unless it is there. Two processes may do so at once: the last rename wins."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    digest = hashlib.blake2b(" ".join([version, *_FLAGS]).encode(), digest_size=8)
    for name in _SOURCES + _HEADERS:
        digest.update((_FOLDER / name).read_bytes())
    folder = _private_folder()
    library = folder / f"kernels-{digest.hexdigest()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            sources = [str(_FOLDER / name) for name in _SOURCES]
            subprocess.run(
                [compiler, *_FLAGS, *sources, "-o", str(made), "-lm"], capture_output=True, check=True, text=True
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
