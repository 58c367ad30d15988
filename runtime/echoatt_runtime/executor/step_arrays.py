"""What a call of the graph takes besides the caches, and its logits.

Shapes: B batch, S new tokens, n wanted logits, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache import Memory
from echoatt_runtime.contract import (
    ELEMENT_TYPES,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
)
from echoatt_runtime.errors import OutOfMemoryError
from echoatt_runtime.ort import Binding

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# Elements between inputs that lie one behind the other: 256 bytes, as CUDA aligns memory itself and
# its kernels may take for granted
_ALIGNMENT: Final = 32


class StepArrays:
    """Arrays that are bound once, for all calls of the same shapes.

    Binding new arrays takes a tenth of a millisecond and more, which a decoding step, whose shapes
    stay the same, need not pay. The inputs lie on the graph's own device, one behind the other:
    what is bound elsewhere would be read when it is bound and not at every call.

    Attributes:
        shape: B, S and n.
        logits: Of the last call, [B, n, V], on the host.
    """

    def __init__(
        self,
        binding: Binding,
        device: str,
        memory: Memory,
        shape: tuple[int, int, int],
        vocab_size: int,
    ) -> None:
        """Allocate and bind.

        Args:
            binding: Of the session.
            device: Where the graph runs.
            memory: Any memory of that device.
            shape: B, S and n.
            vocab_size: V.

        Raises:
            OutOfMemoryError: There is no memory left.
        """
        B, S, n = self.shape = shape
        parts = {INPUT_IDS: (B, S), PAST_LENGTHS: (B,), LOGITS_INDICES: (B, n)}
        sizes = [math.prod(dims) for dims in parts.values()]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        host = np.zeros(sum(padded), np.int64)
        self._bytes = host.view(np.uint8)
        self._device = memory.new(self._bytes.size)
        self._parts: dict[str, Integers] = {}
        begin = 0
        for (name, dims), size, room in zip(parts.items(), sizes, padded, strict=True):
            self._parts[name] = host[begin : begin + size].reshape(dims)
            address = self._device.address + begin * host.itemsize
            binding.bind_input(name, device, ELEMENT_TYPES["int64"], dims, address)
            begin += room
        try:
            self.logits = np.empty((B, n, vocab_size), np.float32)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"there is no memory left for the logits of {B * n} tokens; run fewer prompts at"
                " once, or smaller chunks of them (prefill_chunk)"
            ) from error
        binding.bind_output(
            LOGITS,
            "cpu",
            ELEMENT_TYPES["float32"],
            self.logits.shape,
            self.logits.ctypes.data,
        )

    def fill(self, token_ids: Integers, past_lengths: Integers, logits_indices: Integers) -> None:
        """Put in what the next call shall read: [B, S], [B] and [B, n]."""
        self._parts[INPUT_IDS][...] = token_ids
        self._parts[PAST_LENGTHS][...] = past_lengths
        self._parts[LOGITS_INDICES][...] = logits_indices
        self._device.write(0, self._bytes)
