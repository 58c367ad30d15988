"""Memory of a CUDA device, allocated by ONNX Runtime and copied by CUDA's own runtime.

ONNX Runtime's Python interface copies whole values between host and device only. A cache that grows
moves runs of bytes inside the device, which `cudaMemcpy2D` does in one call.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numpy as np

from echoatt_runtime.cache.memory import Bytes
from echoatt_runtime.errors import DeviceError, OutOfMemoryError, one_line
from echoatt_runtime.ort import import_onnxruntime

_HOST_TO_DEVICE: Final = 1
_DEVICE_TO_HOST: Final = 2
_DEVICE_TO_DEVICE: Final = 3
# The library is in the process already: the CUDA provider needs it
_LIBRARIES: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


class CudaMemory:
    """A run of zeroed bytes on the device.

    Attributes:
        address: Where it begins, for the device.
        nbytes: Its length.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._cuda = _runtime()
        ort = import_onnxruntime()
        try:
            # One byte at least: there is no value of none
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(
                [max(nbytes, 1)], np.uint8, "cuda", 0
            )
        except Exception as error:
            raise OutOfMemoryError(
                f"there is no memory left on cuda for {nbytes:,} bytes ({one_line(error)}); "
                "run fewer prompts at once, or shorter ones"
            ) from error
        self.address: int = self._value.data_ptr()
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
                "cudaMemcpy2D",
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
            self._call("cudaMemset", self.address + start, 0, nbytes)

    def read(self) -> Bytes:
        """See `Memory`."""
        host = np.empty(self.nbytes, np.uint8)
        self._call("cudaMemcpy", host.ctypes.data, self.address, self.nbytes, _DEVICE_TO_HOST)
        return host

    def write(self, start: int, data: Bytes) -> None:
        """See `Memory`."""
        source = np.ascontiguousarray(data)
        self._call(
            "cudaMemcpy", self.address + start, source.ctypes.data, source.size, _HOST_TO_DEVICE
        )

    def _call(self, name: str, *arguments: int) -> None:
        # The graph runs in a stream of its own, which does not wait for the default one
        code = getattr(self._cuda, name)(*arguments) or self._cuda.cudaStreamSynchronize(None)
        if code:
            raise DeviceError(f"{name} failed on cuda with code {code}; see that the GPU works")


@functools.cache
def _runtime() -> Any:
    """CUDA's runtime library, with the types of what is called.

    Raises:
        DeviceError: There is none.
    """
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.cudaMemset.argtypes = [pointer, number, size]
        library.cudaStreamSynchronize.argtypes = [pointer]
        library.cudaMemcpy.argtypes = [pointer, pointer, size, number]
        library.cudaMemcpy2D.argtypes = [pointer, size, pointer, size, size, size, number]
        return library
    raise DeviceError(
        "CUDA's runtime library (libcudart) cannot be loaded; pip install 'echoatt[gpu]' brings it"
    )
