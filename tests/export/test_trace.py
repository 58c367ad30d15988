"""What tracing makes of modules whose own code would hide rows from the passes."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.trace.plain_products import plain_products
from echoatt_exporter.trace.simplify import simplify


class _Block(nn.Module):
    """GPT-2's way: a `Conv1D`, a view of the shape that is there already, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Conv1D(6, 4)
        nn.init.normal_(self.projection.bias)

    def forward(self, hidden_BSE: torch.Tensor) -> torch.Tensor:
        projected = self.projection(hidden_BSE)
        same = projected.view((-1, *hidden_BSE.shape[1:-1], 6)) * 2
        return same.view(*hidden_BSE.shape[:2], 2, 3) * 2


def test_conv1d_is_one_product_of_rows_and_idle_reshapes_are_gone() -> None:
    block, auto = _Block().eval(), torch.export.Dim.AUTO
    hidden_BSE = torch.randn(2, 3, 4)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), plain_products(block):
        found = block(hidden_BSE)
        program = torch.onnx.export(
            block, (hidden_BSE,), dynamo=True, optimize=False, opset_version=24, verbose=False,
            dynamic_shapes=({0: auto, 1: auto},),
        )  # fmt: skip
    assert program is not None
    model = program.model
    simplify(model)

    torch.testing.assert_close(found, block(hidden_BSE))
    assert "forward" not in vars(block.projection)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["MatMul"] == counts["Reshape"] == 1
    assert not counts["Gemm"]
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[0] is model.graph.inputs[0]


def test_conv1d_multiplies_by_its_own_code_again_after_a_failure() -> None:
    block = _Block()
    with pytest.raises(ValueError, match="on the way"), plain_products(block):
        raise ValueError("on the way")
    assert "forward" not in vars(block.projection)
