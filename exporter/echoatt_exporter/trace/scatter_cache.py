"""The key/value cache as a graph sees it: buffers written in place by `TensorScatter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# TensorScatter entered ONNX with opset 24.
OPSET_VERSION = 24


class ScatterCache:
    """Stands in for a transformers cache while a decoder is traced.

    New keys and values are written into fixed-size buffers at each row's own position, and what a
    layer attends to is the whole buffer; the mask hides the rest. Nothing is concatenated, so a
    runtime that binds one buffer to input and output copies nothing.

    Attributes:
        present: By layer, the updated (key, value) buffers, [B, N, T, D] and [B, N, D, T]; a
            follower's key is None.
    """

    is_compileable = False

    def __init__(
        self,
        past: Mapping[int, tuple[torch.Tensor | None, torch.Tensor]],
        past_lengths: torch.Tensor,
    ) -> None:
        """Wrap the buffers.

        Args:
            past: By layer, the (key, value) buffers, [B, N, T, D] and [B, N, D, T]; a follower's
                key is None.
            past_lengths: Int64 [B], where each row's new tokens are written.
        """
        self._past = past
        self._past_lengths = past_lengths
        self.present: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [B, N, S, D]; give both whole buffers back, [B, N, T, D]."""
        past_key, past_value = self._past[layer]
        new_value = self._write(past_value, value.transpose(2, 3), axis=-1)
        if past_key is None:
            self.present[layer] = (None, new_value)
            return key, new_value.transpose(2, 3)
        new_key = self._write(past_key, key, axis=-2)
        self.present[layer] = (new_key, new_value)
        return new_key, new_value.transpose(2, 3)

    def _write(self, buffer: torch.Tensor, new: torch.Tensor, axis: int) -> torch.Tensor:
        written: torch.Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            (buffer, new, self._past_lengths),
            attrs={"axis": axis, "mode": "linear"},
            dtype=new.dtype,
            shape=buffer.shape,
            version=OPSET_VERSION,
        )
        return written
