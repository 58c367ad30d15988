"""Lets an LM head read the embedding table that it is tied to, instead of a transposed copy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
    given,
    graph_of,
    need,
    new_node,
    remove_dead,
    replace,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import role_of, set_role, unite_roles
from echoatt_exporter.graph.weights import add_constant, weight_of


class ShareTiedTable(RewritePass):
    """Replaces a product with a transposed copy of an embedding table by one with the table itself.

    The pass acts on

    1. a MatMul whose second operand is an [E, V] initializer that equals, element for element, the
       transpose of a [V, E] initializer that some Gather looks rows up in: it becomes a Gemm with
       `transB` between two reshapes, and the copy goes.

    It leaves alone weights that are used elsewhere too, and tables that merely look alike.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PACKED})
    roots = frozenset({("", "MatMul")})

    def rewrite(self, node: ir.Node) -> None:
        """Let one product read the table."""
        graph = graph_of(node)
        weight = given(node.inputs[1])
        tensor = weight_of(weight, rank=2)
        need(len(weight.uses()) == 1, f"{weight.name} is used elsewhere too")
        table = self._table(graph, tensor)
        features, vocabulary = tensor.shape.numpy()
        hidden, logits = given(node.inputs[0]), node.outputs[0]

        flat_shape = add_constant(graph, f"{logits.name}.flat", np.array([-1, features], np.int64))
        flat = new_node("Reshape", [hidden, flat_shape], after=logits, suffix="rows")
        gemm = new_node(
            "Gemm", [flat.outputs[0], table], {"transB": 1}, after=logits, suffix="tied"
        )
        rows = ir.node("Shape", [hidden], {"start": 0, "end": -1}, name=f"{logits.name}.outer")
        columns = add_constant(graph, f"{logits.name}.columns", np.array([vocabulary], np.int64))
        shape = ir.node(
            "Concat", [rows.outputs[0], columns], {"axis": 0}, name=f"{logits.name}.shape"
        )
        for made in (rows, shape):
            made.outputs[0].name = made.name
        restored = new_node(
            "Reshape", [gemm.outputs[0], shape.outputs[0]], after=logits, suffix="shared"
        )
        flat.outputs[0].shape = gemm.outputs[0].shape = None
        set_role(table, unite_roles(role_of(table), role_of(weight)))
        graph.insert_before(node, [flat, gemm, rows, shape, restored])
        replace(logits, restored.outputs[0])
        remove_dead(graph, [logits])

    @staticmethod
    def _table(graph: ir.Graph, transposed: ir.TensorProtocol) -> ir.Value:
        """The looked-up table that `transposed` is a copy of."""
        shape = transposed.shape.numpy()[::-1]
        candidates = [
            value
            for value in graph.initializers.values()
            if value.const_value is not None
            and value.const_value.dtype == transposed.dtype
            and tuple(value.const_value.shape.numpy()) == shape
            and any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())
        ]
        for value in candidates:
            if np.array_equal(weight_of(value).numpy(), transposed.numpy().T):
                return value
        raise NoMatch("no embedding table equals it")
