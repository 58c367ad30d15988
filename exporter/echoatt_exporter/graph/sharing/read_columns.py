"""Which columns of a packed projection something reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import (
    NoMatch,
    integers,
    last_axis,
    made_by,
    need,
    shape_of,
    slice_bounds,
    static_dim,
)
from echoatt_exporter.graph.weights import weight_of

PRODUCTS: Final = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "MatMulNBits")})


@dataclass(frozen=True, slots=True)
class ReadPart:
    """A reader's run of columns: begin and end, its value, and the node that takes it out."""

    begin: int
    end: int
    value: ir.Value
    node: ir.Node


@dataclass(frozen=True, slots=True)
class Heads:
    """A projection's result seen as [.., heads, size].

    Attributes:
        value: What is taken apart.
        size: Columns of a head.
        reshape: What puts the result into heads.
        shape: The Concat that makes the Reshape's second operand.
        transpose: What turns them, if anything does.
    """

    value: ir.Value
    size: int
    reshape: ir.Node
    shape: ir.Node
    transpose: ir.Node | None


@dataclass(frozen=True, slots=True)
class ReadColumns:
    """What is read of a projection's result.

    Attributes:
        result: The product's, behind its bias.
        bias: The Add of the bias, if there is one.
        heads: How the result is seen as heads, if it is.
        parts: What is read, of all columns or of each head's.
        keep: Mask of the columns that some part needs, of all or of a head; some are not needed.
    """

    result: ir.Value
    bias: ir.Node | None
    heads: Heads | None
    parts: list[ReadPart]
    keep: np.ndarray

    @property
    def columns(self) -> np.ndarray:
        """Numbers of the product's columns that are kept."""
        kept = np.flatnonzero(self.keep)
        if self.heads is None:
            return kept
        count = static_dim(self.result, -1) // self.heads.size
        numbers: np.ndarray = np.arange(count)[:, None] * self.heads.size + kept[None]
        return numbers.reshape(-1)


def find_read_columns(node: ir.Node) -> ReadColumns:
    """Find what is read of a product with a constant weight.

    Raises:
        NoMatch: All of it, or what cannot be told apart, or the weight cannot be cut.
    """
    weight_layouts(node)
    bias = _bias_after(node)
    result = node.outputs[0] if bias is None else bias.outputs[0]
    need(not result.is_graph_output(), "the result is a graph output")
    heads = _match_heads(result)
    value, size = (result, static_dim(result, -1)) if heads is None else (heads.value, heads.size)
    need(static_dim(result, -1) % size == 0, "heads do not divide the columns")
    parts = _parts(value)
    return ReadColumns(result, bias, heads, parts, _columns(parts, size))


def weight_layouts(node: ir.Node) -> dict[int, tuple[int, int | None]]:
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


def _match_heads(result: ir.Value) -> Heads | None:
    """Match Reshape to [.., heads, size] and perhaps Transpose, both alone; None if not there."""
    uses = tuple(result.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or uses[0].idx != 0:
        return None
    reshape = uses[0].node
    value = reshape.outputs[0]
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

    return Heads(value, size, reshape, dims, transpose)


def _parts(value: ir.Value) -> list[ReadPart]:
    """What is read of `value`, part by part; parts that nothing reads are left out."""
    parts: list[ReadPart] = []
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
                parts.append(ReadPart(begin, end, output, reader))
    need(len(parts) > 0, "nothing reads the result")
    return parts


def _columns(parts: list[ReadPart], size: int) -> np.ndarray:
    """A mask [size] of the columns that some part needs."""
    keep = np.zeros(size, dtype=bool)
    for part in parts:
        keep[part.begin : part.end] = True
    need(not keep.all(), "every column is read")
    return keep
