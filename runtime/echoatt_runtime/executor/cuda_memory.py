"""Memory of a CUDA device, taken and copied by CUDA's own runtime.

ONNX Runtime's Python interface copies whole values between host and device only, where a cache that
grows moves runs of bytes inside the device. And what its allocator has once taken, in powers of
two, a session cannot use when a cache has given it back.

Everything is queued in the device's default stream and waited for at once. ONNX Runtime computes in
a stream of its own, which does not wait for the default one, so that a step would read its inputs
before they have come. The other way round nothing is needed: a run ends when its stream has.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any, Final

import numpy as np

from echoatt_runtime.cache.memory import Bytes
from echoatt_runtime.errors import DeviceError, OutOfMemoryError, one_line
from echoatt_runtime.ort import cuda_library

# cudaMemcpyKind
_HOST_TO_DEVICE: Final = 1
_DEVICE_TO_HOST: Final = 2
_DEVICE_TO_DEVICE: Final = 3
# cudaErrorMemoryAllocation
_OUT_OF_MEMORY: Final = 2
# cudaErrorInsufficientDriver
_OLD_DRIVER: Final = 35
# ONNX Runtime's default
_DEVICE: Final = 0
_DEFAULT_STREAM: Final = None

_NUMBER, _SIZE, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_ARGUMENTS: Final[dict[str, list[Any]]] = {
    "cudaSetDevice": [_NUMBER],
    "cudaMalloc": [_POINTER, _SIZE],
    "cudaFree": [_POINTER],
    "cudaMemsetAsync": [_POINTER, _NUMBER, _SIZE, _POINTER],
    "cudaMemcpyAsync": [_POINTER, _POINTER, _SIZE, _NUMBER, _POINTER],
    "cudaMemcpy2DAsync": [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _NUMBER, _POINTER],
    "cudaStreamSynchronize": [_POINTER],
    "cudaGetLastError": [],
    "cudaGetErrorString": [_NUMBER],
}


class CudaMemory:
    """A run of zeroed bytes on the device, given back with the object.

    Attributes:
        address: Where it begins, for the device, at a multiple of 256; 0 where it has no bytes.
        nbytes: Its length.
    """

    def __init__(self, nbytes: int) -> None:
        self.address, self.nbytes = 0, nbytes
        self._cuda = runtime()
        if not nbytes:
            return
        # Another library may have chosen another device for this thread
        _check("cudaSetDevice", self._cuda.cudaSetDevice(_DEVICE))
        place = ctypes.c_void_p()
        code = self._cuda.cudaMalloc(ctypes.byref(place), nbytes)
        if code == _OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"there is no memory left on cuda for {nbytes:,} bytes ({_forget_error(code)}); "
                "run fewer prompts at once, or shorter ones"
            )
        _check("cudaMalloc", code)
        self.address = int(place.value or 0)
        # When the process ends its memory goes by itself, maybe before this could be called
        weakref.finalize(self, self._cuda.cudaFree, self.address).atexit = False
        self.clear(0, nbytes)

    def new(self, nbytes: int) -> CudaMemory:
        """See `Memory`."""
        return CudaMemory(nbytes)

    def copy_rows(
        self,
        start: int,
        pitch: int,
        width: int,
        target: CudaMemory,
        target_start: int,
        target_pitch: int,
        rows: int,
    ) -> None:
        """See `Memory`; nothing leaves the device."""
        if rows and width:
            self._call(
                "cudaMemcpy2DAsync",
                target.address + target_start,
                target_pitch,
                self.address + start,
                pitch,
                width,
                rows,
                _DEVICE_TO_DEVICE,
            )

    def clear(self, start: int, nbytes: int) -> None:
        """See `Memory`."""
        if nbytes:
            self._call("cudaMemsetAsync", self.address + start, 0, nbytes)

    def read(self, nbytes: int | None = None) -> Bytes:
        """See `Memory`."""
        host = np.empty(self.nbytes if nbytes is None else nbytes, np.uint8)
        self._copy(host.ctypes.data, self.address, host.size, _DEVICE_TO_HOST)
        return host

    def write(self, start: int, data: Bytes) -> None:
        """See `Memory`."""
        source = np.ascontiguousarray(data)
        self._copy(self.address + start, source.ctypes.data, source.size, _HOST_TO_DEVICE)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes:
            self._call("cudaMemcpyAsync", target, source, nbytes, kind)

    def _call(self, name: str, *arguments: int) -> None:
        """Queue a call, and wait for it."""
        _check(name, getattr(self._cuda, name)(*arguments, _DEFAULT_STREAM))
        _check(name, self._cuda.cudaStreamSynchronize(_DEFAULT_STREAM))


def _check(name: str, code: int) -> None:
    """Raise what a call gives back as an error.

    Raises:
        DeviceError: It failed.
    """
    if code == _OLD_DRIVER:
        raise DeviceError(
            f"the NVIDIA driver is absent or too old for ONNX Runtime ({_forget_error(code)});"
            " install or update it"
        )
    if code:
        raise DeviceError(
            f"{name} failed on cuda ({_forget_error(code)}); see that the device works"
        )


def _forget_error(code: int) -> str:
    """An error in CUDA's words. It is forgotten, or ONNX Runtime would take it for its own."""
    cuda = runtime()
    cuda.cudaGetLastError()
    return f"{cuda.cudaGetErrorString(code).decode()}, code {code}"


@functools.cache
def runtime() -> Any:
    """The library with CUDA's functions, which know their arguments' types.

    Raises:
        DeviceError: It cannot be loaded, or lacks a function.
    """
    library = cuda_library()
    try:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except AttributeError as error:
        raise DeviceError(
            f"CUDA's runtime library does not fit ONNX Runtime ({one_line(error)}); "
            "pip install 'onnxruntime-gpu[cuda,cudnn]' brings one that does"
        ) from error
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
