"""Cuts columns that nothing reads out of packed projections."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    new_node,
    remove_dead,
    replace,
    shape_of,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import role_of, set_role, take_columns
from echoatt_exporter.graph.sharing.read_columns import (
    PRODUCTS,
    Heads,
    ReadPart,
    find_read_columns,
    weight_layouts,
)
from echoatt_exporter.graph.weights import add_constant, add_lazy, weight_of


class CutPackedWeights(RewritePass):
    """Cuts a packed projection down to the columns that something reads.

    A projection that computes query, key and value at once keeps all its weights when only the
    value is still read. The pass acts on a MatMul or Gemm with a constant weight, or a
    MatMulNBits, followed by a constant bias or not, whose result is taken apart along the last
    axis by

    1. Slice nodes with constant bounds that leave columns out;
    2. a Split of which some outputs are not read;
    3. a Split of each head's part, after a Reshape to heads (gpt_neox: [.., heads, 3·head_dim],
       transposed or not), of which some outputs are not read.

    Weight, bias, scales and zero points are cut when they are written, not now. What is left of
    the columns is handed on directly if one reader takes it all, else by Slice nodes.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.NO_DEAD_KEYS})
    gives = frozenset({Property.COLUMNS_CUT})
    roots = PRODUCTS

    def rewrite(self, node: ir.Node) -> None:
        """Cut one projection."""
        graph = graph_of(node)
        read = find_read_columns(node)
        cut = _cut_projection(graph, node, read.columns)
        if read.bias is not None:
            cut = _cut_bias(graph, read.bias, node.outputs[0], cut, read.columns)
        if read.heads is not None:
            cut = _rebuild(graph, read.heads, cut, int(read.keep.sum()))
        _redirect_readers(graph, read.parts, cut, read.keep)
        remove_dead(graph, [part.value for part in read.parts] + [read.result])


def _rebuild(graph: ir.Graph, heads: Heads, cut: ir.Value, size: int) -> ir.Value:
    """See a cut result as heads of another size."""
    shaped, old = heads.reshape.outputs[0], heads.shape
    last = add_constant(graph, f"{shaped.name}.cut.size", np.array([size], np.int64))
    # Named after the Reshape: other layers may share the shape, and be cut too
    shape = new_node(
        "Concat", [*old.inputs[:-1], last], {"axis": 0}, after=shaped, suffix="cut.shape"
    )
    shape.outputs[0].shape, shape.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    new = _copy(heads.reshape, [cut, shape.outputs[0]], size)
    graph.insert_before(heads.reshape, [shape, new])
    if heads.transpose is None:
        return new.outputs[0]
    turned = _copy(heads.transpose, [new.outputs[0]], size)
    graph.insert_before(heads.transpose, turned)
    return turned.outputs[0]


def _copy(node: ir.Node, inputs: list[ir.Value | None], columns: int) -> ir.Node:
    """A node like `node`, with other inputs and `columns` in the last dimension of its result."""
    copy = new_node(
        node.op_type,
        inputs,
        dict(node.attributes),
        after=node.outputs[0],
        suffix="cut",
        domain=node.domain,
    )
    copy.outputs[0].shape = ir.Shape([*list(shape_of(node.outputs[0]))[:-1], columns])
    return copy


def _cut_projection(graph: ir.Graph, node: ir.Node, columns: np.ndarray) -> ir.Value:
    """A projection like `node` with these columns only."""
    layouts = weight_layouts(node)
    inputs = list(node.inputs)
    for index, layout in layouts.items():
        inputs[index] = _take(graph, given(inputs[index]), columns, *layout)
    cut = _copy(node, inputs, len(columns))
    if node.op_type == "MatMulNBits":
        cut.attributes["N"] = ir.AttrInt64("N", len(columns))
    graph.insert_before(node, cut)
    return cut.outputs[0]


def _take(
    graph: ir.Graph,
    value: ir.Value,
    columns: np.ndarray,
    axis: int,
    total: int | None = None,
) -> ir.Value:
    """An initializer with some of another's columns; a flat one is seen as [total, ..]."""
    tensor = weight_of(value)
    shape = tensor.shape.numpy()
    if total is not None and shape[0] != total:
        new_shape = [shape[0] // total * len(columns)]
    else:
        new_shape = [len(columns) if index == axis else dim for index, dim in enumerate(shape)]

    def compute() -> np.ndarray:
        array = tensor.numpy()
        if total is not None and shape[0] != total:
            array = array.reshape(total, -1)
        return np.take(array, columns, axis=axis).reshape(new_shape)

    cut = add_lazy(graph, f"{value.name}.cut", compute, tensor.dtype, new_shape)
    set_role(cut, take_columns(role_of(value), columns))
    return cut


def _cut_bias(
    graph: ir.Graph,
    add: ir.Node,
    old: ir.Value,
    cut: ir.Value,
    columns: np.ndarray,
) -> ir.Value:
    """An Add like `add` for the cut projection."""
    inputs: list[ir.Value | None] = [
        cut if item is old else _take(graph, given(item), columns, 0) for item in add.inputs
    ]
    new = _copy(add, inputs, len(columns))
    graph.insert_before(add, new)
    return new.outputs[0]


def _redirect_readers(
    graph: ir.Graph, parts: list[ReadPart], cut: ir.Value, keep: np.ndarray
) -> None:
    """Give each part its columns of the cut result."""
    moved = np.concatenate([[0], np.cumsum(keep)])
    for part in parts:
        begin, end = int(moved[part.begin]), int(moved[part.end])
        if begin == 0 and end == int(keep.sum()):
            replace(part.value, cut)
            continue
        bounds = [
            add_constant(graph, f"{part.value.name}.cut.{name}", np.array([number], np.int64))
            for name, number in (("begin", begin), ("end", end), ("axis", -1))
        ]
        piece = new_node("Slice", [cut, *bounds], after=part.value, suffix="cut")
        graph.insert_before(part.node, piece)
        replace(part.value, piece.outputs[0])
