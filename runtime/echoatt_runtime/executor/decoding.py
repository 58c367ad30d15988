"""Steps of single tokens on a CUDA device, each recorded once as a CUDA graph and then replayed.

A replay reads and writes where the recording did. So what a step takes and gives keeps its place,
and caches that have moved are recorded anew. ONNX Runtime lets no CUDA graph go but with its whole
session.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np

from echoatt_runtime.cache import KVCache, Memory
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor.bind_caches import bind_caches
from echoatt_runtime.executor.step_arrays import Integers, StepArrays, StepRoom
from echoatt_runtime.ort import Binding, OrtSession

# Up to so many rows their number is doubled, and from there on it goes up by so many
_STEP_OF_ROWS: Final = 8
# A recording takes a megabyte or more, and a new session a second
_MOST_RECORDINGS: Final = 256

# Where every cache's rows begin, the capacity, and the number of rows
_Place = tuple[tuple[int, ...], int, int]
# The number of a CUDA graph, and what it reads and writes
_Recording = tuple[int, Binding, StepArrays]


@dataclass(slots=True)
class _Known:
    """Recordings of a cache by first slot and number of rows, as long as it lies where it lay."""

    layout: int
    of_rows: dict[tuple[int, int], _Recording] = field(default_factory=dict)


class Decoding:
    """Single tokens, by a session that is for nothing else.

    Attributes:
        session: The session at work.
    """

    def __init__(
        self,
        open_session: Callable[[], OrtSession],
        specification: Specification,
        memory: Memory,
    ) -> None:
        """Open a session.

        Args:
            open_session: Opens a session for one new token a row, which captures its runs.
            specification: What its graph computes.
            memory: Any memory of its device.

        Raises:
            EchoAttError: As `open_session`.
        """
        self.session = open_session()
        self._open_session = open_session
        self._specification = specification
        self._memory = memory
        self._room: StepRoom | None = None
        self._rows = 0
        self._recorded = 0
        self._recordings: dict[_Place, _Recording] = {}
        # The same again: to ask a cache for all its addresses takes longer than a replay's start
        self._known: WeakKeyDictionary[KVCache, _Known] = WeakKeyDictionary()

    def step(
        self,
        cache: KVCache,
        token_ids: Integers,
        past_lengths: Integers,
        first_slot: int,
        free_behind: int,
    ) -> StepArrays:
        """Run a token of each row.

        Args:
            cache: With room for it.
            token_ids: [B, 1].
            past_lengths: [B].
            first_slot: The slot of the first row.
            free_behind: Slots behind the rows that may be written into: more rows than are asked
                for may be those that are recorded already.

        Returns:
            What it gave, for B rows or more.

        Raises:
            EchoAttError: As `OrtSession.run`, and there may be no memory left for what it gives.
        """
        B = len(token_ids)
        rows = min(_rounded(B), B + free_behind)
        number, binding, arrays = self._recording(cache, first_slot, rows)
        arrays.fill(token_ids, past_lengths, np.zeros((B, 1), np.int64))
        self.session.run(binding, number)
        return arrays

    def _recording(self, cache: KVCache, first_slot: int, rows: int) -> _Recording:
        """What runs these rows; the first run of its number records it."""
        known = self._known.get(cache)
        if known is None or known.layout != cache.layout:
            known = self._known[cache] = _Known(cache.layout)
        found = known.of_rows.get((first_slot, rows))
        if found is None:
            found = self._find(cache, first_slot, rows)
            known.of_rows[first_slot, rows] = found
        return found

    def _find(self, cache: KVCache, first_slot: int, rows: int) -> _Recording:
        """The recording of a place, made if it is not there."""
        room = self._room
        if room is None or rows > self._rows:
            # All recordings are of the room that goes
            self._forget()
            self._room = None
            shape = (max(rows, cache.slots), 1, 1)
            room = self._room = StepRoom.of(self._memory, shape, self._specification)
            self._rows = shape[0]
        addresses = tuple(cache.address(index, first_slot) for index in range(len(cache.specs)))
        place = addresses, cache.capacity, rows
        found = self._recordings.get(place)
        if found is None:
            if self._recorded == _MOST_RECORDINGS:
                self._forget()
                self.session = self._open_session()
                self._recorded = 0
            self._recorded += 1
            binding, device = self.session.new_binding(), self.session.device
            bind_caches(binding, device, cache, first_slot, rows)
            arrays = StepArrays(binding, device, room, (rows, 1, 1), self._specification)
            found = self._recordings[place] = self._recorded, binding, arrays
        return found

    def _forget(self) -> None:
        self._recordings.clear()
        for known in self._known.values():
            known.of_rows.clear()


def _rounded(rows: int) -> int:
    """A number of rows to record a step of, for as many or a few less."""
    if rows <= _STEP_OF_ROWS:
        return 1 << (rows - 1).bit_length()
    return -(-rows // _STEP_OF_ROWS) * _STEP_OF_ROWS
