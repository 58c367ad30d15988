"""Lets a graph choose the most probable tokens itself."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.matching import shape_of
from echoatt_exporter.graph.weights import add_constant
from echoatt_runtime.contract import CHOICES, LOGIT_SUMS, LOGITS

_OUTPUTS: Final = {
    CHOICES: ("ArgMax", ir.DataType.INT64),
    LOGIT_SUMS: ("ReduceSum", ir.DataType.FLOAT),
}


class ChooseTokens(GraphPass):
    """Adds outputs for a greedy step, so that the logits can stay where they are.

    B batch, n wanted rows, V vocabulary. Of the logits [B, n, V] the pass gives out

    1. the most probable token at each position, [B, n];
    2. the sum over the vocabulary, [B, n]: it is finite where every logit is, and where it is not
       the token means nothing.

    A graph that has them already stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the outputs."""
        graph = model.graph
        names = [value.name for value in graph.outputs]
        if CHOICES in names:
            return ir.passes.PassResult(model, modified=False)
        logits = graph.outputs[names.index(LOGITS)]
        axes = add_constant(graph, f"{LOGIT_SUMS}.axes", np.array([-1], np.int64))
        for name, (op_type, dtype) in _OUTPUTS.items():
            attributes = {"keepdims": 0} | ({"axis": -1} if op_type == "ArgMax" else {})
            inputs = [logits] if op_type == "ArgMax" else [logits, axes]
            node = ir.node(op_type, inputs, attributes, name=name)
            result = node.outputs[0]
            result.name, result.type = name, ir.TensorType(dtype)
            result.shape = ir.Shape(list(shape_of(logits))[:2])
            graph.append(node)
            graph.outputs.append(result)
        return ir.passes.PassResult(model, modified=True)
