"""What projections read and give, and how their weights are changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.families.projections import weight_out_in
from echoatt_exporter.refit.spilled import SpilledTensor

Projection = nn.Linear | Conv1D


@dataclass(slots=True)
class Recorded:
    """The last call of a projection.

    Attributes:
        input: [B, T, K].
        output: [B, T, N].
    """

    input: torch.Tensor
    output: torch.Tensor


@contextmanager
def recording(projection: Projection) -> Iterator[Recorded]:
    """Keep a projection's last call."""
    nothing = torch.empty(0)
    recorded = Recorded(nothing, nothing)

    def on_call(_module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        recorded.input, recorded.output = arguments[0], output

    hook = projection.register_forward_hook(on_call)
    try:
        yield recorded
    finally:
        hook.remove()


def add_to(projection: Projection, change_NK: torch.Tensor, dtype: torch.dtype) -> None:
    """Change a weight, and by a last column the bias if there is one.

    Args:
        projection: Gets parameters of its own, for others may hold the memory of those it has.
        change_NK: [N, K], or [N, K + 1].
        dtype: What the result will be stored in: it is rounded to it.
    """
    weight_NK = weight_out_in(projection)
    size = weight_NK.shape[1]
    changed_NK = (weight_NK.double() + change_NK[:, :size]).to(dtype).to(weight_NK.dtype)
    own = changed_NK.T if isinstance(projection, Conv1D) else changed_NK
    projection.weight = nn.Parameter(own.contiguous(), projection.weight.requires_grad)
    if projection.bias is not None:
        bias_N = (projection.bias.double() + change_NK[:, size]).to(dtype).to(weight_NK.dtype)
        projection.bias = nn.Parameter(bias_N, projection.bias.requires_grad)


def changed_copy(projection: Projection, change_NK: torch.Tensor) -> Projection:
    """A projection with another weight, which lies in a file, and everything else the same.

    Args:
        projection: Left as it is.
        change_NK: As in `add_to`.
    """
    changed = copy.copy(projection)
    # The shallow copy has the very same dictionary
    changed._parameters = dict(projection._parameters)  # noqa: SLF001
    add_to(changed, change_NK, projection.weight.dtype)
    spilled = SpilledTensor(changed.weight.shape, changed.weight.dtype)
    spilled.values.copy_(changed.weight)
    changed.weight = nn.Parameter(spilled.values, requires_grad=False)
    return changed
