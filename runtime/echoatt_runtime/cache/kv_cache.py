"""The key/value cache: slots of memory that a graph updates in place, and that grow and shrink.

It knows nothing of ONNX Runtime: an executor binds the memory by its address. A slot holds a row's
keys and values; rows at work take the first slots, because a graph reads one run of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache.capacity import bucket_capacity
from echoatt_runtime.cache.memory import Memory
from echoatt_runtime.contract import CacheSpec
from echoatt_runtime.errors import OutOfMemoryError

# Smaller memory for the rows that are left is worth the copy from a quarter less on
_SHRINK_NUMERATOR, _SHRINK_DENOMINATOR = 3, 4


class KVCache:
    """The caches of a number of slots, all of one capacity.

    Attributes:
        specs: How each cache lies in memory.
        slots: Rows that there is room for.
        capacity: Tokens that each of them has room for.
        limit: Most tokens that a row will ever hold: no capacity is larger than that needs.
        layout: A number that changes when the memory moves.
    """

    def __init__(
        self, specs: Sequence[CacheSpec], memory: Memory, slots: int, capacity: int, limit: int
    ) -> None:
        """Allocate the caches, all zeros.

        Args:
            specs: How each cache lies.
            memory: Any memory of the device; new one is asked of it.
            slots: Rows that there is room for. A CPU takes no memory for a slot before it is used.
            capacity: Tokens that each has room for; `bucket_capacity` says what is sensible.
            limit: Most tokens that a row will ever hold.

        Raises:
            OutOfMemoryError: There is no memory left.
        """
        self.specs = tuple(specs)
        self.slots = slots
        self.capacity = capacity
        self.limit = limit
        self.layout = 0
        self._memories = [memory.new(slots * self._row_bytes(spec)) for spec in self.specs]

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take when all slots are in use."""
        return sum(memory.nbytes for memory in self._memories)

    def address(self, index: int, slot: int) -> int:
        """Where a slot of the cache `specs[index]` begins, for the device."""
        return self._memories[index].address + slot * self._row_bytes(self.specs[index])

    def reserve(self, tokens: int, lengths: Sequence[int]) -> None:
        """Make room for `tokens` tokens a row; do nothing where there is room.

        Args:
            tokens: That a row must have room for.
            lengths: Of the first slots, the tokens that they hold and that are kept.

        Raises:
            ContextOverflowError: As in `bucket_capacity`.
            OutOfMemoryError: There is no memory left; the cache is as it was.
        """
        if tokens > self.capacity:
            self._move_to(bucket_capacity(tokens, self.limit), lengths)

    def shrink(self, tokens: int, lengths: Sequence[int]) -> None:
        """Give room back that rows which have left needed, where that is worth the copy.

        A graph reads the whole capacity at every step, so that a short row would pay for a long one
        that is gone.

        Args:
            tokens: That a row must have room for.
            lengths: As in `reserve`.
        """
        capacity = bucket_capacity(tokens, self.limit)
        if capacity * _SHRINK_DENOMINATOR <= self.capacity * _SHRINK_NUMERATOR:
            # Without room for a buffer beside the old one it stays as it is
            with contextlib.suppress(OutOfMemoryError):
                self._move_to(capacity, lengths)

    def move(self, source: int, target: int, length: int) -> None:
        """Move a row from one slot to another; the others stay where they are.

        Args:
            source: The slot that it leaves.
            target: The slot that it goes to.
            length: Tokens that it holds.
        """
        for spec, memory in zip(self.specs, self._memories, strict=True):
            row = self._row_bytes(spec)
            outer, inner = _around_capacity(spec)
            pitch = self.capacity * inner
            memory.copy_rows(
                source * row, pitch, length * inner, memory, target * row, pitch, outer
            )

    def clear(self, slot: int) -> None:
        """Forget what a slot holds.

        What lies behind a row's tokens is masked by a probability of zero, and zero times what is
        not a number is none either: after a row that failed the next one would fail too.
        """
        for spec, memory in zip(self.specs, self._memories, strict=True):
            row = self._row_bytes(spec)
            memory.clear(slot * row, row)

    def array(self, index: int) -> npt.NDArray[Any]:
        """The cache `specs[index]` on the host, [slots, ...]: on a CPU the memory itself."""
        spec = self.specs[index]
        data = self._memories[index].read().view(spec.elements.host)
        return data.reshape(spec.shape(self.slots, self.capacity))

    def fill(self, index: int, values: npt.NDArray[Any]) -> None:
        """Put `values` into the whole cache `specs[index]`; they have the shape of `array`."""
        data = np.ascontiguousarray(values, self.specs[index].elements.host)
        self._memories[index].write(0, data.reshape(-1).view(np.uint8))

    def _row_bytes(self, spec: CacheSpec) -> int:
        return spec.bytes_per_token * self.capacity

    def _move_to(self, capacity: int, lengths: Sequence[int]) -> None:
        """Lay every slot out anew. One buffer after another: at most one of them exists twice."""
        moved: list[int] = []
        self.layout += 1
        try:
            for index in range(len(self.specs)):
                self._move_buffer(index, self.capacity, capacity, lengths)
                moved.append(index)
        except OutOfMemoryError:
            # As it was: what a buffer left when it moved is free to take it back
            for index in reversed(moved):
                self._move_buffer(index, capacity, self.capacity, lengths)
            raise
        self.capacity = capacity

    def _move_buffer(self, index: int, before: int, after: int, lengths: Sequence[int]) -> None:
        """Move one cache from memory of a capacity to new memory of another."""
        spec, old = self.specs[index], self._memories[index]
        outer, inner = _around_capacity(spec)
        new = old.new(self.slots * spec.bytes_per_token * after)
        for slot, length in enumerate(lengths):
            old.copy_rows(
                slot * spec.bytes_per_token * before,
                before * inner,
                length * inner,
                new,
                slot * spec.bytes_per_token * after,
                after * inner,
                outer,
            )
        self._memories[index] = new


def _around_capacity(spec: CacheSpec) -> tuple[int, int]:
    """Of a slot, the runs of tokens, and the bytes of a token in one of them."""
    axis = spec.capacity_axis
    before = math.prod(size for size in spec.axes[1:axis] if isinstance(size, int))
    behind = math.prod(size for size in spec.axes[axis + 1 :] if isinstance(size, int))
    return before, behind * spec.elements.bytes
