"""The key/value cache as a graph sees it: buffers written in place by `TensorScatter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from echoatt_runtime.contract import CacheSpec

# TensorScatter entered ONNX with opset 24.
OPSET_VERSION = 24

# The axis of tokens in what a layer gives its cache and gets back: [batch, heads, tokens, size]
_TOKENS = 2


class ScatterCache:
    """Stands in for a transformers cache while a decoder is traced.

    New keys and values are written into fixed-size buffers at each row's own position, and what a
    layer attends to is the whole buffer; the mask hides the rest. Nothing is concatenated, so a
    runtime that binds one buffer to input and output copies nothing. How a buffer lies in memory is
    its `CacheSpec`'s to say; a layer sees it as transformers has it.

    B batch, N key/value heads, S new tokens, T capacity, D head size.
    """

    is_compileable = False

    def __init__(
        self,
        caches: Sequence[CacheSpec],
        past: Sequence[torch.Tensor],
        past_lengths: torch.Tensor,
    ) -> None:
        """Wrap the buffers.

        Args:
            caches: How each buffer lies; a follower has no keys.
            past: The buffers, in the order of `caches`.
            past_lengths: Int64 [B], where each row's new tokens are written.
        """
        self._caches = {(cache.layer, cache.kind): cache for cache in caches}
        self._buffers = dict(zip(self._caches, past, strict=True))
        self._past_lengths = past_lengths

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The buffers in the order of the caches, those that were written as they are then."""
        return list(self._buffers.values())

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values [B, N, S, D]; give both whole buffers back, [B, N, T, D]."""
        new_value = self._write(layer, "value", value)
        if (layer, "key") not in self._caches:
            return key, new_value
        return self._write(layer, "key", key), new_value

    def _write(self, layer: int, kind: str, new: torch.Tensor) -> torch.Tensor:
        """Write into one buffer, and see it as [B, N, T, D]."""
        axis = self._caches[layer, kind].capacity_axis
        buffer = self._buffers[layer, kind]
        written: torch.Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            (buffer, _move_axis(new, _TOKENS, axis), self._past_lengths),
            # From the end, as the operator's own default has it
            attrs={"axis": axis - buffer.dim(), "mode": "linear"},
            dtype=new.dtype,
            shape=buffer.shape,
            version=OPSET_VERSION,
        )
        self._buffers[layer, kind] = written
        return _move_axis(written, axis, _TOKENS)


def _move_axis(tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """The tensor itself where nothing moves: no node shall be traced for it."""
    return tensor if source == target else tensor.movedim(source, target)
