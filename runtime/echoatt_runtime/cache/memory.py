"""Memory of a device, as far as a cache needs it: an address, zeros, and copies of blocks."""

from __future__ import annotations

from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from echoatt_runtime.errors import OutOfMemoryError

Bytes = npt.NDArray[np.uint8]

# A cache line, and the widest vector register
_ALIGNMENT: Final = 64


class Memory(Protocol):
    """A run of zeroed bytes on a device.

    Attributes:
        address: Where it begins, for the device.
        nbytes: Its length.
    """

    address: int
    nbytes: int

    def new(self, nbytes: int) -> Self:
        """Other zeroed memory on the same device.

        Raises:
            OutOfMemoryError: There is none left.
        """

    def copy_rows(
        self,
        start: int,
        pitch: int,
        width: int,
        target: Self,
        target_start: int,
        target_pitch: int,
        rows: int,
    ) -> None:
        """Copy `rows` runs of `width` bytes into other memory of the device, or within this.

        Args:
            start: Where the first run begins.
            pitch: From one run's beginning to the next one's.
            width: Bytes of a run.
            target: Where to.
            target_start: Where the first run goes.
            target_pitch: As `pitch`, there.
            rows: Number of runs.
        """

    def clear(self, start: int, nbytes: int) -> None:
        """Set bytes to zero."""

    def read(self, nbytes: int | None = None) -> Bytes:
        """The first bytes, or all, on the host: the memory itself on a CPU, else a copy."""

    def write(self, start: int, data: Bytes) -> None:
        """Put bytes of the host in."""


class HostMemory:
    """Memory of the host. The system gives pages as they are first written.

    Attributes:
        address: Where it begins, at a cache line.
        nbytes: Its length.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            whole = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"there is no memory left for a cache of {nbytes:,} bytes; "
                "run fewer prompts at once, or shorter ones"
            ) from error
        begin = -whole.ctypes.data % _ALIGNMENT
        self._bytes = whole[begin : begin + nbytes]
        self.address = self._bytes.ctypes.data
        self.nbytes = nbytes

    def new(self, nbytes: int) -> HostMemory:
        """See `Memory`."""
        return HostMemory(nbytes)

    def copy_rows(
        self,
        start: int,
        pitch: int,
        width: int,
        target: HostMemory,
        target_start: int,
        target_pitch: int,
        rows: int,
    ) -> None:
        """See `Memory`."""
        _rows(target._bytes, target_start, target_pitch, width, rows)[...] = _rows(
            self._bytes, start, pitch, width, rows
        )

    def clear(self, start: int, nbytes: int) -> None:
        """See `Memory`."""
        self._bytes[start : start + nbytes] = 0

    def read(self, nbytes: int | None = None) -> Bytes:
        """See `Memory`."""
        return self._bytes[:nbytes]

    def write(self, start: int, data: Bytes) -> None:
        """See `Memory`."""
        self._bytes[start : start + data.size] = data


def _rows(data: Bytes, start: int, pitch: int, width: int, rows: int) -> Bytes:
    """A view [rows, width] of runs of bytes."""
    if rows == 0 or width == 0:
        return data[:0].reshape(0, 1)
    # Checked by numpy: what the view covers lies inside
    covered = data[start : start + (rows - 1) * pitch + width]
    if covered.size != (rows - 1) * pitch + width:
        raise IndexError(f"{rows} runs of {width} bytes from {start} are not inside {data.size}")
    return np.lib.stride_tricks.as_strided(covered, (rows, width), (pitch, 1))
