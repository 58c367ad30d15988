"""Nodes that mark, in a traced graph, where layers begin and end and what they lend.

They compute nothing and are gone once the layers have been laid out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from echoatt_exporter.share.modeling_echoatt import MaterializedAttention

DOMAIN = "echoatt.trace"
LAYER_INPUT, LAYER_OUTPUT, PROBABILITIES = "LayerInput", "LayerOutput", "Probabilities"


def _mark(kind: str, value: torch.Tensor, layer: int) -> torch.Tensor:
    marked: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        (value,),
        attrs={"layer": layer},
        dtype=value.dtype,
        shape=value.shape,
        version=1,
    )
    return marked


class MarkedAttention(MaterializedAttention):
    """Shared attention whose lent probabilities are marked."""

    def lend(self, layer: int, probabilities: torch.Tensor) -> None:
        """Keep a source's probabilities, marked with its number."""
        super().lend(layer, _mark(PROBABILITIES, probabilities, layer))


@contextmanager
def marked_layers(layers: nn.ModuleList, numbers: tuple[int, ...]) -> Iterator[None]:
    """Mark the hidden states that enter and leave each of `layers`."""
    with ExitStack() as stack:
        for layer, number in zip(layers, numbers, strict=True):

            def enter(
                _: nn.Module, arguments: tuple[Any, ...], number: int = number
            ) -> tuple[Any, ...]:
                # Every family gives the hidden states first, by position
                return (_mark(LAYER_INPUT, arguments[0], number), *arguments[1:])

            def leave(
                _: nn.Module, __: tuple[Any, ...], output: torch.Tensor, number: int = number
            ) -> torch.Tensor:
                return _mark(LAYER_OUTPUT, output, number)

            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        yield
