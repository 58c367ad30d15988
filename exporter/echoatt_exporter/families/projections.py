"""Projections as modules hold them: `torch.nn.Linear`, or the `Conv1D` of GPT-2's time.

A `Conv1D` is a linear layer whose weight is stored the other way round, [in, out].
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_projection(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module multiplies by a weight and adds a bias, if it has one."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_out_in(module: nn.Linear | Conv1D | nn.Embedding) -> torch.Tensor:
    """A projection's weight as [out, in], or a table of embeddings, without a copy."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def take_outputs(module: nn.Module, index: torch.Tensor) -> None:
    """Permute what a projection or norm gives, in place: its weight and its bias."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            # The last axis of a vector is its first
            axis = parameter.ndim - 1 if isinstance(module, Conv1D) else 0
            parameter.data = parameter.data.index_select(axis, index.to(parameter.device))


def take_inputs(projection: nn.Linear | Conv1D, index: torch.Tensor) -> None:
    """Permute what a projection reads, in place."""
    axis = 0 if isinstance(projection, Conv1D) else 1
    weight = projection.weight
    weight.data = weight.data.index_select(axis, index.to(weight.device))


def cut_outputs(projection: nn.Linear | Conv1D, index: torch.Tensor) -> nn.Linear:
    """A projection of its own with some of another's outputs.

    Args:
        projection: Left as it is; the result shares no memory with it, which would keep all of it
            alive.
        index: Int64 [N], which outputs.
    """
    weight, bias = weight_out_in(projection), projection.bias
    cut = nn.Linear(
        weight.shape[1], len(index), bias=bias is not None, device="meta", dtype=weight.dtype
    )
    index = index.to(weight.device)
    trained = projection.weight.requires_grad
    cut.weight = nn.Parameter(weight.detach().index_select(0, index).contiguous(), trained)
    if bias is not None:
        cut.bias = nn.Parameter(bias.detach().index_select(0, index), trained)
    return cut
