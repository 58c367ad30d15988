"""Cuts columns that nothing reads out of packed projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import (
    NoMatch,
    RewritePass,
    given,
    graph_of,
    integers,
    last_axis,
    made_by,
    need,
    new_node,
    remove_dead,
    replace,
    shape_of,
    slice_bounds,
    static_dim,
)
from echoatt_exporter.graph.weights import add_constant, add_lazy, name_of_kept, weight_of

_Namer = Callable[[str], str]


class CutPackedWeights(RewritePass):
    """Cuts a packed projection down to the columns that something reads.

    A projection that computes query, key and value at once keeps all its weights when only the
    value is still read. Runs after RemoveDeadBranches. The pass acts on a MatMul or Gemm with a
    constant weight, or a MatMulNBits, followed by a constant bias or not, whose result is taken
    apart along the last axis by

    1. Slice nodes with constant bounds that leave columns out;
    2. a Split of which some outputs are not read;
    3. a Split of each head's part, after a Reshape to heads (gpt_neox: [.., heads, 3·head_dim],
       transposed or not), of which some outputs are not read.

    Weight, bias, scales and zero points are cut when they are written, not now. What is left of
    the columns is handed on directly if one reader takes it all, else by Slice nodes.
    """

    roots = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "MatMulNBits")})

    def rewrite(self, node: ir.Node) -> None:
        """Cut one projection."""
        graph = graph_of(node)
        bias = _bias_after(node)
        result = node.outputs[0] if bias is None else bias.outputs[0]
        need(not result.is_graph_output(), "the result is a graph output")
        heads = _match_heads(result)
        if heads is None:
            parts, size = _parts(result), static_dim(result, -1)
            keep = _columns(parts, size)
        else:
            parts, size = _parts(heads.value), heads.size
            keep = _columns(parts, size)
            columns = static_dim(result, -1)
            need(columns % size == 0, "heads do not divide the columns")
        kept = np.flatnonzero(keep)
        rows = kept if heads is None else _tile(kept, size, static_dim(result, -1) // size)
        name = _namer(result if heads is None else heads.value)
        cut = _cut_projection(graph, node, rows, name)
        if bias is not None:
            cut = _cut_bias(graph, bias, node.outputs[0], cut, rows, name)
        if heads is not None:
            cut = heads.rebuild(graph, cut, len(kept))
        _redirect_readers(graph, parts, cut, keep)
        remove_dead(graph, [part.value for part in parts] + [result])


@dataclass(frozen=True, slots=True)
class _Part:
    """A reader's run of columns: begin and end, its value, and the node that takes it out."""

    begin: int
    end: int
    value: ir.Value
    node: ir.Node


@dataclass(frozen=True, slots=True)
class _Heads:
    """A projection's result seen as [.., heads, size], and how to build that for another size."""

    value: ir.Value
    size: int
    rebuild: Callable[[ir.Graph, ir.Value, int], ir.Value]


def _bias_after(node: ir.Node) -> ir.Node | None:
    """The Add of a constant vector that alone reads the projection; None without one."""
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or not other.is_initializer() or len(shape_of(other)) != 1:
        return None
    return add


def _parts(value: ir.Value) -> list[_Part]:
    """What is read of `value`, part by part; parts that nothing reads are left out."""
    parts: list[_Part] = []
    for use in value.uses():
        reader = use.node
        if reader.op_type == "Slice" and use.idx == 0:
            bounds = [slice_bounds(reader)]
        elif reader.op_type == "Split" and use.idx == 0:
            need(last_axis(value, reader.attributes.get_int("axis", 0)), "a Split of another axis")
            ends = np.cumsum([static_dim(output, -1) for output in reader.outputs])
            bounds = [
                (int(end) - static_dim(output, -1), int(end))
                for end, output in zip(ends, reader.outputs, strict=True)
            ]
        else:
            raise NoMatch(f"{reader.op_type} reads all of {value.name}")
        for (begin, end), output in zip(bounds, reader.outputs, strict=True):
            if output.uses() or output.is_graph_output():
                parts.append(_Part(begin, end, output, reader))
    need(len(parts) > 0, "nothing reads the result")
    return parts


def _namer(value: ir.Value) -> _Namer:
    """How to name what is cut, from the parts that a Split still hands on."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or readers[0].op_type != "Split":
        return "{}.cut".format
    outputs = readers[0].outputs
    kept = [i for i, output in enumerate(outputs) if output.uses() or output.is_graph_output()]
    return lambda name: name_of_kept(name, kept, len(outputs))


def _columns(parts: list[_Part], size: int) -> np.ndarray:
    """A mask [size] of the columns that some part needs."""
    keep = np.zeros(size, dtype=bool)
    for part in parts:
        keep[part.begin : part.end] = True
    need(not keep.all(), "every column is read")
    return keep


def _tile(kept: np.ndarray, size: int, heads: int) -> np.ndarray:
    """Column indices of every head, from those of one."""
    indices: np.ndarray = (np.arange(heads)[:, None] * size + kept[None]).reshape(-1)
    return indices


def _match_heads(result: ir.Value) -> _Heads | None:
    """Match Reshape to [.., heads, size] and perhaps Transpose, both alone; None if not there."""
    uses = tuple(result.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx != 0:
        return None
    reshape = uses[0].node
    value = shaped = reshape.outputs[0]
    dims = made_by(reshape.inputs[1], "Concat")
    size = static_dim(value, -1)
    need(len(shape_of(value)) == 4, "the result is not reshaped to heads")
    need(not value.is_graph_output(), "the reshaped result is a graph output")
    need(
        integers(dims.inputs[-1]) == [size],
        "the size of a head is not the shape's own last constant",
    )
    transpose = None
    readers = tuple(value.uses())
    if len(readers) == 1 and readers[0].node.op_type == "Transpose":
        transpose = readers[0].node
        permutation = transpose.attributes.get_ints("perm", ())
        need(len(permutation) == 4 and permutation[-1] == 3, "the Transpose moves the last axis")
        value = transpose.outputs[0]
        need(not value.is_graph_output(), "the transposed result is a graph output")

    def rebuild(graph: ir.Graph, cut: ir.Value, kept: int) -> ir.Value:
        last = add_constant(graph, f"{shaped.name}.cut.size", np.array([kept], np.int64))
        # Named after the Reshape: other layers may share the shape, and be cut too
        shape = new_node(
            "Concat", [*dims.inputs[:-1], last], {"axis": 0}, after=shaped, suffix="cut.shape"
        )
        shape.outputs[0].shape, shape.outputs[0].type = dims.outputs[0].shape, dims.outputs[0].type
        new = _copy(reshape, [cut, shape.outputs[0]], kept)
        graph.insert_before(reshape, [shape, new])
        if transpose is None:
            return new.outputs[0]
        turned = _copy(transpose, [new.outputs[0]], kept)
        graph.insert_before(transpose, turned)
        return turned.outputs[0]

    return _Heads(value, size, rebuild)


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


def _cut_projection(graph: ir.Graph, node: ir.Node, columns: np.ndarray, name: _Namer) -> ir.Value:
    """A projection like `node` with these columns only."""
    layouts = _weight_layouts(node)
    inputs = list(node.inputs)
    for index, layout in layouts.items():
        inputs[index] = _take(graph, given(inputs[index]), columns, name, *layout)
    cut = _copy(node, inputs, len(columns))
    if node.op_type == "MatMulNBits":
        cut.attributes["N"] = ir.AttrInt64("N", len(columns))
    graph.insert_before(node, cut)
    return cut.outputs[0]


def _weight_layouts(node: ir.Node) -> dict[int, tuple[int, int | None]]:
    """For each constant input its axis of columns, and their number where it may be flat.

    Raises:
        NoMatch: An input is not constant, or laid out in a way that is not known.
    """
    layouts: dict[int, tuple[int, int | None]] = {}
    if node.op_type == "MatMulNBits":
        columns = node.attributes.get_int("N", 0)
        for index, item in enumerate(node.inputs):
            # Input 4 is g_idx, which is along the rows; all others are laid out by columns
            if index in (0, 4) or item is None:
                continue
            size = weight_of(item).shape[0]
            flat = len(shape_of(item)) == 1 and isinstance(size, int) and size % columns == 0
            need(size == columns or flat, f"{item.name} is not laid out by columns")
            layouts[index] = (0, columns)
        return layouts
    weight_of(node.inputs[1], rank=2)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    layouts[1] = (0 if transposed else 1, None)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        weight_of(node.inputs[2], rank=1)
        layouts[2] = (0, None)
    return layouts


def _take(
    graph: ir.Graph,
    value: ir.Value,
    columns: np.ndarray,
    name: _Namer,
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

    return add_lazy(graph, name(str(value.name)), compute, tensor.dtype, new_shape)


def _cut_bias(
    graph: ir.Graph,
    add: ir.Node,
    old: ir.Value,
    cut: ir.Value,
    columns: np.ndarray,
    name: _Namer,
) -> ir.Value:
    """An Add like `add` for the cut projection."""
    inputs: list[ir.Value | None] = [
        cut if item is old else _take(graph, given(item), columns, name, 0) for item in add.inputs
    ]
    new = _copy(add, inputs, len(columns))
    graph.insert_before(add, new)
    return new.outputs[0]


def _redirect_readers(graph: ir.Graph, parts: list[_Part], cut: ir.Value, keep: np.ndarray) -> None:
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
