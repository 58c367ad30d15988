"""Walks back from a value to the products that compute it, and says which of their columns it is.

A selection is a mask of the elements that matter, with the dimensions of its value, where those
that change from run to run have size 1; None means all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import NoMatch, given, integers, need, shape_of
from echoatt_exporter.graph.roles import is_weight

Selection = np.ndarray | None

# Inputs, by operator, that are not the data itself: sizes, angles, indices
_DATA_FIRST: Final = frozenset(
    {"Expand", "GatherElements", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze"}
    | {"Unsqueeze"}
)
_BY_ELEMENT: Final = frozenset(
    {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Neg", "Sub"} | {"GatherElements"}
)
# These mix the elements of the last axis
_ALONG_LAST: Final = frozenset(
    {"LayerNormalization", "RMSNormalization", "RotaryEmbedding"}
    | {"SkipSimplifiedLayerNormalization"}
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A weight with those of its columns that matter.

    Attributes:
        weight: The initializer.
        total: How many columns it has.
        columns: Mask [total]; None for all.
    """

    weight: ir.Value
    total: int
    columns: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a walk back has met.

    Attributes:
        claims: The weights of the products at its ends and of what stands in front of them.
        products: The products.
    """

    claims: list[Claim] = field(default_factory=list)
    products: list[ir.Node] = field(default_factory=list)


class Walk:
    """Walks through one graph."""

    def __init__(self, graph: ir.Graph, hidden: Container[ir.Value]) -> None:
        """Take the graph and those of its values that depend on what the tokens are."""
        self._place: Mapping[ir.Node, int] = {node: place for place, node in enumerate(graph)}
        self._hidden = hidden

    def back(self, start: ir.Value) -> Found:
        """Walk to the nearest products with constant weights.

        Raises:
            NoMatch: It cannot be seen which columns matter.
        """
        found = Found()
        wanted: dict[ir.Value, Selection] = {start: None}
        # From the end of the graph, so that all readers of a value come before it
        ahead: list[tuple[int, int]] = []
        nodes: dict[int, ir.Node] = {}

        def go_to(value: ir.Value, selection: Selection) -> None:
            wanted[value] = _either(wanted[value], selection) if value in wanted else selection
            node = value.producer()
            if node is not None and node in self._place and self._place[node] not in nodes:
                nodes[self._place[node]] = node
                heapq.heappush(ahead, (-self._place[node], self._place[node]))

        go_to(start, None)
        while ahead:
            node = nodes[heapq.heappop(ahead)[1]]
            for output in node.outputs:
                if output not in wanted:
                    continue
                if (columns := columns_of(node)) is not None:
                    if node not in found.products:
                        found.products.append(node)
                    mask = _last(wanted[output], columns)
                    found.claims.extend(claims_of_product(node, columns, mask))
                    continue
                for operand, selection in _operands(node, output, wanted[output]):
                    if operand.is_initializer():
                        if is_weight(operand):
                            found.claims.append(_claim(operand, selection))
                    elif operand in self._hidden:
                        go_to(operand, selection)
        return found


def columns_of(node: ir.Node) -> int | None:
    """The columns of a product with a constant weight; None for any other node."""
    if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits"):
        return node.attributes.get_int("N", 0)
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    shape = weight.const_value.shape.numpy()
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return int(shape[0 if transposed else -1])


def claims_of_product(
    node: ir.Node, total: int, columns: np.ndarray | None = None
) -> Iterator[Claim]:
    """A product's weight, with scales, zero points and bias: all that is laid out by columns."""
    for value in node.inputs[1:]:
        if value is not None and value.is_initializer() and is_weight(value):
            yield Claim(value, total, columns)


def _claim(weight: ir.Value, selection: Selection) -> Claim:
    """A weight beside a value: its columns are those of its last axis."""
    shape = shape_of(weight)
    total = int(cast(int, shape[-1])) if len(shape) else 1
    return Claim(weight, total, _last(selection, total))


def _last(selection: Selection, size: int) -> np.ndarray | None:
    """A selection's mask along the last axis."""
    if selection is None:
        return None
    need(selection.shape[-1] in (1, size), "a selection is not of the product's columns")
    flat = selection.reshape(-1, selection.shape[-1]).any(axis=0)
    return np.broadcast_to(flat, (size,))


def _either(one: Selection, other: Selection) -> Selection:
    return None if one is None or other is None else _whole(one | other)


def _whole(selection: np.ndarray) -> Selection:
    return None if bool(selection.all()) else selection


def _mask_shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape_of(value))


def _operands(
    node: ir.Node, output: ir.Value, selection: Selection
) -> Iterator[tuple[ir.Value, Selection]]:
    """What a node reads to compute the selected elements of one output."""
    op, data = node.op_type, node.inputs[0]
    others = [value for value in node.inputs if value is not None]
    if data is None:
        return
    if op == "Split":
        yield data, _of_split(node, data, output, selection)
    elif op == "Slice":
        yield data, _of_slice(node, data, selection)
    elif op == "Concat":
        yield from _of_concat(node, others, selection)
    elif selection is None:
        for value in others[:1] if op in _DATA_FIRST else others:
            yield value, None
    elif op == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(selection.ndim))))
        yield data, selection.transpose(np.argsort(order))
    elif op in ("Reshape", "Squeeze", "Unsqueeze"):
        yield data, _of_reshape(data, selection)
    elif op in _ALONG_LAST:
        mixed = np.broadcast_to(selection.any(axis=-1, keepdims=True), selection.shape)
        for value in others[:1] if op in _DATA_FIRST else others:
            yield value, _whole(mixed) if value not in others[1:] else None
    elif op in _BY_ELEMENT:
        for value in others[:1] if op in _DATA_FIRST else others:
            yield value, _of_element(value, selection)
    else:
        raise NoMatch(f"{op} reads a part of {data.name}")


def _of_element(value: ir.Value, selection: np.ndarray) -> Selection:
    """The elements of an operand that is broadcast to the selection's shape."""
    shape = _mask_shape(value)
    shape = (1,) * (selection.ndim - len(shape)) + shape
    axes = tuple(i for i, size in enumerate(shape) if size == 1)
    mine = selection.any(axis=axes, keepdims=True)
    need(mine.shape == shape, f"{value.name} is not as large as what it is combined with")
    return _whole(mine.reshape(_mask_shape(value)))


def _of_reshape(data: ir.Value, selection: np.ndarray) -> np.ndarray:
    shape = _mask_shape(data)
    # Heads whose number is not known are all alike
    if selection.size == selection.shape[-1] and shape[-1] % selection.size == 0:
        count = int(np.prod(shape)) // selection.size
        return np.tile(selection.reshape(-1), count).reshape(shape)
    need(int(np.prod(shape)) == selection.size, "a Reshape mixes what is selected")
    return selection.reshape(shape)


def _of_split(
    node: ir.Node, data: ir.Value, output: ir.Value, selection: Selection
) -> np.ndarray | None:
    mask = np.zeros(_mask_shape(data), bool)
    axis = node.attributes.get_int("axis", 0)
    begin = 0
    for other in node.outputs:
        size = _mask_shape(other)[axis]
        if other is output:
            places = [slice(None)] * mask.ndim
            places[axis] = slice(begin, begin + size)
            mask[tuple(places)] = True if selection is None else selection
        begin += size
    need(begin == mask.shape[axis], "a Split is of an axis without a fixed size")
    return _whole(mask)


def _of_slice(node: ir.Node, data: ir.Value, selection: Selection) -> np.ndarray | None:
    mask = np.zeros(_mask_shape(data), bool)
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    rest = [None if item is None else integers(item) for item in node.inputs[3:]]
    axes = rest[0] if rest and rest[0] is not None else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 and rest[1] is not None else [1] * len(starts)
    places = [slice(None)] * mask.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if isinstance(shape_of(data)[axis], int):
            places[axis] = slice(start, end, step)
    mask[tuple(places)] = True if selection is None else selection
    return _whole(mask)


def _of_concat(
    node: ir.Node, operands: list[ir.Value], selection: Selection
) -> Iterator[tuple[ir.Value, Selection]]:
    axis, begin = node.attributes.get_int("axis", 0), 0
    for value in operands:
        if selection is None:
            yield value, None
            continue
        size = _mask_shape(given(value))[axis]
        part = np.take(selection, range(begin, begin + size), axis=axis)
        if part.any():
            yield value, _whole(part)
        begin += size
