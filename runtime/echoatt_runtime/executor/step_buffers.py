"""What a call of the graph takes besides the caches, and its logits.

Shapes: B batch, S new tokens, n wanted logits, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from echoatt_runtime.contract.manifest import INPUT_IDS, LOGITS, LOGITS_INDICES, PAST_LENGTHS

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class StepBuffers:
    """Host arrays that are bound once, for all calls of the same shapes.

    Binding four new arrays takes a tenth of a millisecond and more, which a decoding step, whose
    shapes stay the same, need not pay.

    Args:
        binding: ONNX Runtime's IO binding.
        batch: B.
        new_tokens: S.
        wanted: N.
        vocab_size: V.

    Attributes:
        logits: Of the last call, [B, n, V].
    """

    def __init__(
        self, binding: Any, batch: int, new_tokens: int, wanted: int, vocab_size: int
    ) -> None:
        self._token_ids = np.empty((batch, new_tokens), np.int64)
        self._past_lengths = np.empty(batch, np.int64)
        self._logits_indices = np.empty((batch, wanted), np.int64)
        self.logits = np.empty((batch, wanted, vocab_size), np.float32)
        # ONNX Runtime reads and writes these very arrays
        binding.bind_cpu_input(INPUT_IDS, self._token_ids)
        binding.bind_cpu_input(PAST_LENGTHS, self._past_lengths)
        binding.bind_cpu_input(LOGITS_INDICES, self._logits_indices)
        shape, address = self.logits.shape, self.logits.ctypes.data
        binding.bind_output(LOGITS, "cpu", 0, np.float32, shape, address)

    def fit(self, token_ids: Integers, logits_indices: Integers) -> bool:
        """Whether a call has these shapes."""
        return (
            self._token_ids.shape == token_ids.shape
            and self._logits_indices.shape == logits_indices.shape
        )

    def fill(self, token_ids: Integers, past_lengths: Integers, logits_indices: Integers) -> None:
        """Put in what the next call shall read: [B, S], [B] and [B, n]."""
        self._token_ids[...] = token_ids
        self._past_lengths[...] = past_lengths
        self._logits_indices[...] = logits_indices
