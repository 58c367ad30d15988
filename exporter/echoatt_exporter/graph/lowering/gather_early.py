"""Looks up the rows whose logits are wanted as soon as nothing else needs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
    given,
    graph_of,
    integers,
    last_axis,
    made_by,
    need,
    new_node,
    remove_dead,
    replace,
    same_dim,
    shape_of,
    static_dim,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.weights import add_constant
from echoatt_runtime.contract import LOGITS_INDICES

# The operands, by operator, that hold rows; the others are weights
_PRODUCTS: Final = {("", "MatMul"): 1, ("com.microsoft", "MatMulNBits"): 1}
_OVER_FEATURES: Final = {
    ("", "LayerNormalization"): 1,
    ("", "RMSNormalization"): 1,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): 2,
    ("", "Split"): 1,
}
_BY_ELEMENT: Final = frozenset(
    {"Add", "Cast", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sqrt"}
    | {"Sub", "Tanh"}
)


class GatherEarly(RewritePass):
    """Moves the look-up of the wanted rows from the LM head to where the last layer has attended.

    Keys and values are needed of every token, but behind the last layer's attention each row is on
    its own, and of a prompt's chunk one row is wanted: the others' output projection, MLP and norm
    would be computed for nobody. That is nearly one layer of the products of a prefill.

    B batch, S tokens of the call, n wanted rows, F features. The pass acts on

    1. a GatherElements along S of hidden states [B, S, F] by `logits_indices`, in front of which
       stand nodes that treat every row alike and whose results nothing else reads: products with
       weights, norms and Splits of the features, operators by element. They compute the wanted rows
       only, from look-ups in the values at which such nodes end, the last layer's context and its
       residual stream.

    It leaves alone a GatherElements with no product in front of it that could be spared, also its
    own work: a bundle that is rewritten. (GatherND would need no index of every feature, but on
    CUDA it copies from the host, which a CUDA graph cannot record.)
    """

    needs = frozenset({Property.NO_BRANCHES, Property.RESIDUALS_FUSED, Property.PACKED})
    roots = frozenset({("", "GatherElements")})

    def rewrite(self, node: ir.Node) -> None:
        """Move one look-up."""
        graph = graph_of(node)
        hidden = given(node.inputs[0])
        need(len(shape_of(hidden)) == 3, "the hidden states do not have three dimensions")
        need(node.attributes.get_int("axis", 0) in (1, -2), "the look-up is not along the tokens")
        column = made_by(made_by(node.inputs[1], "Expand").inputs[0], "Unsqueeze")
        wanted = given(column.inputs[0])
        is_contracts = wanted.is_graph_input() and wanted.name == LOGITS_INDICES
        need(is_contracts, f"the look-up is not by {LOGITS_INDICES}")
        need(integers(column.inputs[1]) in ([2], [-1]), "the indices are not of whole rows")

        spared, ends = _rows_apart(graph, node)
        need(
            any((item.domain, item.op_type) in _PRODUCTS for item in spared),
            "no product in front of it computes rows for it alone",
        )
        sizes = [static_dim(end, 2) for end in ends]
        index_of = _indices(graph, wanted, sizes)
        number = shape_of(wanted)[1]
        for end, size in zip(ends, sizes, strict=True):
            readers = [use for use in end.uses() if use.node in spared]
            lookup = new_node(
                "GatherElements", [end, index_of[size]], {"axis": 1}, after=end, suffix="wanted"
            )
            lookup.outputs[0].shape = _with_rows(end, number)
            graph.insert_before(min((use.node for use in readers), key=spared.index), lookup)
            for reader, position in readers:
                reader.replace_input_with(position, lookup.outputs[0])
        for item in spared:
            for output in item.outputs:
                output.shape = _with_rows(output, number)
        result = node.outputs[0]
        replace(result, hidden)
        remove_dead(graph, [result])


def _rows_apart(graph: ir.Graph, lookup: ir.Node) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute rows for `lookup` alone, in graph order, and the values they read."""
    spared: list[ir.Node] = []
    # Of the nodes so far and the look-up itself, the operands that hold rows
    read = {given(lookup.inputs[0]): None}
    for node in reversed(graph):
        if not any(output in read for output in node.outputs):
            continue
        uses = [use.node for output in node.outputs for use in output.uses()]
        is_output = any(output.is_graph_output() for output in node.outputs)
        if is_output or any(user is not lookup and user not in spared for user in uses):
            continue
        try:
            operands = _row_operands(node)
        except NoMatch:
            continue
        spared.insert(0, node)
        for output in node.outputs:
            read.pop(output, None)
        read |= dict.fromkeys(operands)
    return spared, list(read)


def _row_operands(node: ir.Node) -> list[ir.Value]:
    """The operands [B, S, F] of a node that treats every row alike.

    Raises:
        NoMatch: It does not, or cannot be seen to.
    """
    kind = (node.domain, node.op_type)
    operands = [value for value in node.inputs if value is not None]
    if node.domain == "" and node.op_type in _BY_ELEMENT:
        rows = [value for value in operands if not _is_same_for_rows(value)]
    else:
        number = (_PRODUCTS | _OVER_FEATURES).get(kind)
        if number is None:
            raise NoMatch(f"{node.op_type} does not treat every row alike")
        rows = operands[:number]
        weights = operands[number:]
        need(all(value.is_initializer() for value in weights), "a weight is not an initializer")
        if kind in _OVER_FEATURES and node.domain == "":
            # A Split's default is another axis than a norm's
            axis = node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1)
            need(last_axis(rows[0], axis), "the axis is not that of the features")
    need(bool(rows), "no operand has rows")
    for value in rows:
        need(len(shape_of(value)) == 3, f"{value.name} does not have three dimensions")
        alike = all(same_dim(value, axis, rows[0], axis) for axis in (0, 1))
        need(alike, "the operands' batches or rows differ")
    return rows


def _is_same_for_rows(value: ir.Value) -> bool:
    """Whether an operand of an operator by element is a constant of one row at most."""
    return value.is_initializer() and len(shape_of(value)) <= 1


def _indices(graph: ir.Graph, wanted: ir.Value, sizes: Iterable[int]) -> dict[int, ir.Value]:
    """The wanted rows as GatherElements takes them, [B, n, F], by number of features."""
    axis = add_constant(graph, f"{LOGITS_INDICES}.axis", np.array([2], np.int64))
    column = ir.node("Unsqueeze", [wanted, axis], name=f"{LOGITS_INDICES}.column")
    nodes, expanded = [column], {}
    for size in dict.fromkeys(sizes):
        name = f"{LOGITS_INDICES}.of_{size}"
        shape = add_constant(graph, f"{name}.shape", np.array([1, 1, size], np.int64))
        nodes.append(ir.node("Expand", [column.outputs[0], shape], name=name))
        expanded[size] = nodes[-1].outputs[0]
    for node, features in zip(nodes, [1, *expanded], strict=True):
        result = node.outputs[0]
        result.name, result.type = node.name, ir.TensorType(ir.DataType.INT64)
        result.shape = ir.Shape([*shape_of(wanted), features])
    graph.insert_before(graph[0], nodes)
    return expanded


def _with_rows(value: ir.Value, number: int | ir.SymbolicDim) -> ir.Shape | None:
    """A value's shape with another number of rows."""
    if value.shape is None:
        return None
    batch, _, features = value.shape
    return ir.Shape([batch, number, features])
