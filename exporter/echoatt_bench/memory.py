"""How fast this machine reads memory: what no engine can beat."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BYTES = 2**30
# Large beside what a call costs in Python
_PIECE = 2**22
_REPEATS = 3

Numbers = npt.NDArray[np.int64]


class MemoryReader:
    """A large array that threads read once, each its own part of it."""

    def __init__(self, threads: int, size: int = _BYTES) -> None:
        self._numbers: Numbers = np.ones(size // 8, np.int64)
        self._parts = [
            np.array_split(part, max(1, part.nbytes // _PIECE))
            for part in np.array_split(self._numbers, threads)
        ]

    def bytes_per_second(self) -> float:
        """The best of a few readings."""
        return self._numbers.nbytes / min(self._seconds() for _ in range(_REPEATS))

    def _seconds(self) -> float:
        threads = [threading.Thread(target=_read, args=(part,)) for part in self._parts]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begin


def _read(pieces: Sequence[Numbers]) -> None:
    # of numpy's reductions the one that is nearest to reading and nothing else: measured
    for piece in pieces:
        np.maximum.reduce(piece)
