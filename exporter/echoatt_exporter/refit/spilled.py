"""Tensors of many windows that lie in a file, so that memory does not grow with the text."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch

from echoatt_runtime.errors import OutOfMemoryError, one_line


class SpilledTensor:
    """A tensor over windows in a temporary file without a name, which ends with the object.

    What was read and written lately is in memory, and the system takes that back when it needs it.

    Attributes:
        shape: [W, ...].
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Make room, of zeros.

        Args:
            shape: [W, ...].
            dtype: Of its elements.

        Raises:
            OutOfMemoryError: There is no room for it.
        """
        self.shape = tuple(shape)
        size = math.prod(self.shape)
        try:
            with tempfile.NamedTemporaryFile(prefix="echoatt-") as file:
                _reserve(file.fileno(), size * dtype.itemsize)
                flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        except OSError as error:
            raise OutOfMemoryError(
                f"there is no room for {size * dtype.itemsize:,} bytes in {tempfile.gettempdir()}"
                f" ({one_line(error)}); free some, or name another folder in TMPDIR"
            ) from error
        self._values = flat.view(self.shape)

    @property
    def values(self) -> torch.Tensor:
        """All of it, where it lies."""
        return self._values

    def read(self, rows: slice) -> torch.Tensor:
        """A copy of some windows."""
        return self._values[rows].clone()

    def write(self, rows: slice, values: torch.Tensor) -> None:
        """Replace some windows."""
        self._values[rows] = values


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take room: where it is only found to be missing when it is written to, the process ends."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(descriptor, 0, max(1, nbytes))
    else:
        os.ftruncate(descriptor, nbytes)
