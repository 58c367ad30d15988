"""What a call of the graph takes and gives besides the caches.

Shapes: B batch, S new tokens, n wanted logits, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache import Memory
from echoatt_runtime.contract import (
    CHOICES,
    ELEMENT_TYPES,
    INPUT_IDS,
    LOGIT_SUMS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    Specification,
)
from echoatt_runtime.errors import OutOfMemoryError
from echoatt_runtime.executor.alignment import aligned
from echoatt_runtime.ort import Binding

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepRoom:
    """Memory for what calls take and give, on the graph's own device.

    Attributes:
        inputs: Of the tokens, the lengths and the indices, one behind the other.
        logits: Of the logits.
        choices: Of the chosen tokens and the sums behind them, if the graph gives them.
    """

    inputs: Memory
    logits: Memory
    choices: Memory

    @classmethod
    def of(
        cls, memory: Memory, shape: tuple[int, int, int], specification: Specification
    ) -> StepRoom:
        """Room for calls of a shape, or of fewer rows of it.

        Args:
            memory: Any memory of the device.
            shape: B, S and n.
            specification: Of the graph.

        Raises:
            OutOfMemoryError: There is no memory left.
        """
        B, S, n = shape
        inputs = sum(aligned(8 * size) for size in (B * S, B, B * n))
        chosen = aligned(8 * B * n) + 4 * B * n if specification.choice_names else 0
        try:
            logits = memory.new(4 * B * n * specification.vocab_size)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"there is no memory left for the logits of {B * n} tokens; run fewer prompts at"
                " once, or smaller chunks of them (prefill_chunk)"
            ) from error
        return cls(memory.new(inputs), logits, memory.new(chosen))


class StepArrays:
    """Arrays that are bound once, for all calls of the same shapes.

    Binding new arrays takes a tenth of a millisecond and more, which a decoding step, whose shapes
    stay the same, need not pay. All of them lie on the graph's own device: an input that is bound
    elsewhere would be read when it is bound and not at every call, and an output would be copied
    whether it is wanted or not.

    Attributes:
        shape: B, S and n.
    """

    def __init__(
        self,
        binding: Binding,
        device: str,
        room: StepRoom,
        shape: tuple[int, int, int],
        specification: Specification,
    ) -> None:
        """Bind.

        Args:
            binding: Of the session.
            device: Where the graph runs.
            room: For this shape at least.
            shape: B, S and n.
            specification: Of the graph.
        """
        B, S, n = self.shape = shape
        self._room, self._vocab_size = room, specification.vocab_size
        integers, floats = ELEMENT_TYPES["int64"], ELEMENT_TYPES["float32"]
        parts = {INPUT_IDS: (B, S), PAST_LENGTHS: (B,), LOGITS_INDICES: (B, n)}
        self._bytes = np.zeros(
            sum(aligned(8 * math.prod(dims)) for dims in parts.values()), np.uint8
        )
        self._parts: dict[str, Integers] = {}
        begin = 0
        for name, dims in parts.items():
            end = begin + 8 * math.prod(dims)
            self._parts[name] = self._bytes[begin:end].view(np.int64).reshape(dims)
            binding.bind_input(name, device, integers, dims, room.inputs.address + begin)
            begin += aligned(end - begin)
        dims = (B, n, self._vocab_size)
        binding.bind_output(LOGITS, device, floats, dims, room.logits.address)
        self._sums_begin = aligned(8 * B * n)
        if specification.choice_names:
            address = room.choices.address
            binding.bind_output(CHOICES, device, integers, (B, n), address)
            binding.bind_output(LOGIT_SUMS, device, floats, (B, n), address + self._sums_begin)

    def fill(self, token_ids: Integers, past_lengths: Integers, logits_indices: Integers) -> None:
        """Put in what the next call shall read: [B, S], [B] and [B, n]; fewer rows leave the rest.

        All of it goes to the device as one copy.
        """
        rows = len(token_ids)
        self._parts[INPUT_IDS][:rows] = token_ids
        self._parts[PAST_LENGTHS][:rows] = past_lengths
        self._parts[LOGITS_INDICES][:rows] = logits_indices
        self._room.inputs.write(0, self._bytes)

    def logits(self, rows: int) -> Logits:
        """The first rows' logits of the last call, [rows, n, V]: a view on a CPU, else a copy."""
        n = self.shape[2]
        data = self._room.logits.read(4 * rows * n * self._vocab_size)
        return data.view(np.float32).reshape(rows, n, self._vocab_size)

    @property
    def logits_address(self) -> int:
        """Where the logits begin, for the device."""
        return self._room.logits.address

    def choices(self, rows: int) -> tuple[Integers, Logits]:
        """The first rows' chosen tokens and sums of the last call, as copies, each [rows, n]."""
        B, _, n = self.shape
        data = self._room.choices.read(self._sums_begin + 4 * B * n)
        token_ids = data[: 8 * rows * n].view(np.int64)
        sums = data[self._sums_begin :][: 4 * rows * n].view(np.float32)
        return token_ids.reshape(rows, n).copy(), sums.reshape(rows, n).copy()
