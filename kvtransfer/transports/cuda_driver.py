"""CUDA's interprocess memory, by the driver's own library: what ``cuda_ipc`` needs of it and nothing more.

The library (libcuda.so.1) is there wherever a GPU works, and its interface stays as it is. torch has a way of its own,
but for tensors that are passed on once: it counts readers in a file, and each must take its share exactly once. Memory
that lives as long as its process needs none of that.

Works within the primary context of a device, which is torch's too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from kvtransfer.transports.cuda_ipc import IpcUnavailable, OpenedMemory, SharedMemory

LIBRARY = "libcuda.so.1"
TOKEN_BYTES = 64
_LAZY_PEER_ACCESS = 1
_DEVICE_ORDINAL = 9


class _Token(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * TOKEN_BYTES),)


class _Exposed:
    """Device memory as torch takes it, without owning it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class CudaDriver:
    """An ``IpcDriver``. Raises IpcUnavailable where there is no driver."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise IpcUnavailable(f"there is no CUDA driver here: {error}") from error
        # By value, and 64 bits wide: ctypes would pass plain ints as 32.
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = (ctypes.c_void_p, _Token, ctypes.c_uint)
        self._cuda.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)
        self._cuda.cuIpcGetMemHandle.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._cuda.cuMemGetAddressRange_v2.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
        self._cuda.cuPointerGetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)

    def share(self, memory: Tensor) -> SharedMemory:
        address = memory.data_ptr()
        with self._on(memory.device):
            base = self._base(address)
            token = _Token()
            wish = "share this memory (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes some that cannot be)"
            self._check(self._cuda.cuIpcGetMemHandle(ctypes.byref(token), base), wish)
        return SharedMemory(bytes(token.reserved), address - base)

    def open(self, shared: SharedMemory, num_bytes: int, near: Tensor) -> OpenedMemory:
        if len(shared.token) != TOKEN_BYTES:
            raise IpcUnavailable(f"a token has {TOKEN_BYTES} bytes, got {len(shared.token)}")
        token = _Token.from_buffer_copy(shared.token)
        found = ctypes.c_uint64()
        with self._on(near.device):
            opening = self._cuda.cuIpcOpenMemHandle_v2(ctypes.byref(found), token, _LAZY_PEER_ACCESS)
            self._check(opening, "open the peer's memory")
            base, ordinal = found.value, ctypes.c_int()
            asking = self._cuda.cuPointerGetAttribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, base)
            try:
                self._check(asking, "find the peer's device")
            except IpcUnavailable:
                self._cuda.cuIpcCloseMemHandle(base)
                raise
        exposed = _Exposed(base + shared.offset, num_bytes)
        return OpenedMemory(torch.as_tensor(exposed, device=torch.device("cuda", ordinal.value)), base)

    def close(self, opened: OpenedMemory, near: Tensor) -> None:
        with suppress(IpcUnavailable), self._on(near.device):
            self._cuda.cuIpcCloseMemHandle(opened.address)  # where it fails, the context is gone, and all with it

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """Makes the device's primary context this thread's current one."""
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(number), device.index or 0), "find the device")
        self._check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "use the device")
        try:
            self._check(self._cuda.cuCtxPushCurrent_v2(context), "use the device's context")
            try:
                yield
            finally:
                self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            self._cuda.cuDevicePrimaryCtxRelease_v2(number)

    def _base(self, address: int) -> int:
        """Where the allocation that holds ``address`` begins: that is what a token opens."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        asking = self._cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        self._check(asking, "find the allocation")
        return base.value

    def _check(self, result: int, wish: str) -> None:
        if result == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(result, ctypes.byref(text))
        raise IpcUnavailable(f"cannot {wish}: {(text.value or b'CUDA error %d' % result).decode()}")
