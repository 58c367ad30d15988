"""Projections as the graph shall show them: a product of rows and a weight, whatever the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def _product(projection: Conv1D, hidden_BSE: torch.Tensor) -> torch.Tensor:
    return hidden_BSE @ projection.weight + projection.bias


@contextmanager
def plain_products(decoder: nn.Module) -> Iterator[None]:
    """Let every `Conv1D` multiply as a `torch.nn.Linear` does.

    Its own code joins batch and tokens to one axis and parts them again, and the passes, which look
    for rows [B, S, E], would understand none of its products.
    """
    projections = [module for module in decoder.modules() if isinstance(module, Conv1D)]
    try:
        for projection in projections:
            setattr(projection, "forward", partial(_product, projection))  # noqa: B010
        yield
    finally:
        for projection in projections:
            delattr(projection, "forward")
