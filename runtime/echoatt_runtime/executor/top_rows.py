"""The most probable tokens of each row, found where the logits are.

Shapes: B batch, V vocabulary, k tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from echoatt_runtime.cache import Memory
from echoatt_runtime.contract import ELEMENT_TYPES
from echoatt_runtime.executor.alignment import aligned
from echoatt_runtime.executor.step_arrays import Integers, Logits
from echoatt_runtime.ort import (
    TOP_LOGITS,
    TOP_LOGITS_INPUT,
    TOP_TOKENS,
    SessionOptions,
    open_session,
    top_model,
)

MOST_TOP: Final = 64


@dataclass(frozen=True, slots=True)
class TopLogits:
    """Some tokens of each row, among them all that are as probable as any of them or more.

    Attributes:
        token_ids: [B, k], the most probable first.
        logits: Theirs, [B, k].
    """

    token_ids: Integers
    logits: Logits


class TopRows:
    """Finds them on a device, and only they come to the host."""

    def __init__(self, device: str, memory: Memory, vocab_size: int) -> None:
        """Open a session.

        Args:
            device: Where the logits are.
            memory: Any memory of it.
            vocab_size: V.

        Raises:
            EchoAttError: As `open_session`.
        """
        # One more than is asked for shows whether that one is as probable
        self._number = min(MOST_TOP + 1, vocab_size)
        self._vocab_size = vocab_size
        model = top_model(vocab_size, self._number)
        self._session = open_session(model, SessionOptions(device=device), "the largest logits")
        self._memory = memory

    def find(self, address: int, rows: int, number: int) -> TopLogits | None:
        """Find the most probable tokens.

        Args:
            address: Of float32 logits [B, V] on the device.
            rows: B.
            number: How many are wanted, at most `MOST_TOP`.

        Returns:
            Them, with a few more; None if there may be others that are as probable.

        Raises:
            EchoAttError: As `OrtSession.run`.
        """
        binding, device = self._session.new_binding(), self._session.device
        floats, integers = ELEMENT_TYPES["float32"], ELEMENT_TYPES["int64"]
        shape = rows, self._number
        begin = aligned(4 * rows * self._number)
        found = self._memory.new(begin + 8 * rows * self._number)
        binding.bind_input(TOP_LOGITS_INPUT, device, floats, (rows, self._vocab_size), address)
        binding.bind_output(TOP_LOGITS, device, floats, shape, found.address)
        binding.bind_output(TOP_TOKENS, device, integers, shape, found.address + begin)
        self._session.run(binding)
        data = found.read()
        logits = data[: 4 * rows * self._number].view(np.float32).reshape(shape)
        token_ids = data[begin:].view(np.int64).reshape(shape)
        cut = self._number < self._vocab_size
        if cut and (logits[:, number - 1] == logits[:, -1]).any():
            return None
        return TopLogits(token_ids, logits)
