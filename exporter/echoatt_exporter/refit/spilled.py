"""Tensors of many windows that lie in a file, so that memory does not grow with the text."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch


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
            OSError: There is no room for it.
        """
        self.shape = tuple(shape)
        with tempfile.NamedTemporaryFile(prefix="echoatt-") as file:
            # Room that is only found to be missing when it is written to would end the process
            size = math.prod(self.shape)
            _reserve(file.fileno(), size * dtype.itemsize)
            flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
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
    os.posix_fallocate(descriptor, 0, max(1, nbytes))
