"""What the rewriting passes share: reading constants, walking the graph, replacing nodes.

A rule states what it needs through these helpers. Whatever is missing raises `NoMatch` with
the reason, which `RewritePass` logs, so that a rule which leaves a node alone can say why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

# Constants that steer a pattern (axes, exponents, slice bounds) are tiny; weights must not be read.
_SMALL = 16


class NoMatch(Exception):  # noqa: N818 - it is an outcome, not an error
    """A rule does not apply to a node; the message says why."""


def need(condition: bool, reason: str) -> None:
    """Raise `NoMatch` with `reason` unless `condition` holds."""
    if not condition:
        raise NoMatch(reason)


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node:
    """The node of type `op_type` that computes `value`.

    Raises:
        NoMatch: Another operator computes it, or none.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain != domain:
        found = "no node" if node is None else node.op_type
        name = "a missing input" if value is None else value.name
        raise NoMatch(f"{name} comes from {found}, not from {op_type}")
    return node


def given(value: ir.Value | None) -> ir.Value:
    """`value`, which must be there.

    Raises:
        NoMatch: It is an omitted optional input.
    """
    if value is None:
        raise NoMatch("an input is missing")
    return value


def only_used_by(value: ir.Value, *nodes: ir.Node) -> None:
    """Check that nobody but `nodes` reads `value`.

    Raises:
        NoMatch: Another node does, or it is a graph output.
    """
    need(not value.is_graph_output(), f"{value.name} is a graph output")
    others = [use.node for use in value.uses() if use.node not in nodes]
    need(not others, f"{value.name} is used elsewhere too")


def only_reader(value: ir.Value) -> ir.Node:
    """The one node that reads `value`, once.

    Raises:
        NoMatch: Nothing reads it, several do, or it is a graph output.
    """
    uses = tuple(value.uses())
    need(not value.is_graph_output() and len(uses) == 1, f"{value.name} is not read once")
    return uses[0].node


def split_operands(
    node: ir.Node, op_type: str, domain: str = ""
) -> Iterable[tuple[ir.Node, ir.Value]]:
    """Both readings of a commutative node: one operand's producer of type `op_type`, the other."""
    for index in (0, 1):
        producer = given(node.inputs[index]).producer()
        if producer is not None and (producer.op_type, producer.domain) == (op_type, domain):
            yield producer, given(node.inputs[1 - index])


def constant(value: ir.Value | None) -> np.ndarray:
    """A small constant's elements: of an initializer or of a Constant node.

    Raises:
        NoMatch: It is computed, is a graph input, or is too large to be a pattern's constant.
    """
    value = given(value)
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or value.is_graph_input():
        raise NoMatch(f"{value.name} is not constant")
    need(tensor.size <= _SMALL, f"{value.name} has {tensor.size} elements, not a few")
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float:
    """A constant's only element.

    Raises:
        NoMatch: Not constant, or not of one element.
    """
    array = constant(value)
    need(array.size == 1, "a constant has more than one element")
    return float(array.reshape(()))


def integers(value: ir.Value | None) -> list[int]:
    """A constant's elements as a flat list.

    Raises:
        NoMatch: Not constant, or not of integers.
    """
    array = constant(value)
    need(np.issubdtype(array.dtype, np.integer), "a constant is not of integers")
    return [int(item) for item in array.reshape(-1)]


def shape_of(value: ir.Value) -> ir.Shape:
    """A value's shape.

    Raises:
        NoMatch: Not even the rank is known.
    """
    if value.shape is None:
        raise NoMatch(f"the shape of {value.name} is not known")
    return value.shape


def static_dim(value: ir.Value, axis: int) -> int:
    """A dimension that does not change from run to run.

    Raises:
        NoMatch: It does, or is not known.
    """
    dim = shape_of(value)[axis]
    if not isinstance(dim, int):
        raise NoMatch(f"dimension {axis} of {value.name} is not fixed")
    return dim


def same_dim(left: ir.Value, left_axis: int, right: ir.Value, right_axis: int) -> bool:
    """Whether two dimensions are known and equal in every run."""
    if left.shape is None or right.shape is None:
        return False
    first, second = left.shape[left_axis], right.shape[right_axis]
    if isinstance(first, int) or isinstance(second, int):
        return first == second
    return first.value is not None and str(first) == str(second)


def same_shape(left: ir.Value, right: ir.Value) -> bool:
    """Whether two shapes are known and equal in every run."""
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    return all(same_dim(left, axis, right, axis) for axis in range(len(left.shape)))


def last_axis(value: ir.Value, axis: int) -> bool:
    """Whether `axis` names the last axis of `value`."""
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def slice_bounds(node: ir.Node) -> tuple[int, int]:
    """Begin and end of a Slice that takes a run of the last axis, whose size is fixed.

    Raises:
        NoMatch: Another axis, several axes, steps, or bounds that are not constant.
    """
    data = given(node.inputs[0])
    size = static_dim(data, -1)
    need(len(node.inputs) >= 4, "a Slice names no axes")
    axes = integers(node.inputs[3])
    need(len(axes) == 1 and last_axis(data, axes[0]), "a Slice is not of the last axis")
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        need(integers(node.inputs[4]) == [1], "a Slice has steps")
    (begin,), (end,) = integers(node.inputs[1]), integers(node.inputs[2])
    begin, end, _ = slice(begin, end).indices(size)
    return begin, end


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, ir.Attr | int | float | Sequence[int]] | None = None,
    *,
    after: ir.Value,
    suffix: str,
    domain: str = "",
) -> ir.Node:
    """A node whose result stands in for `after`, with its type and shape.

    Node and result are named after the value and not after its node: nodes of foreign graphs may
    have no name, and two of ours must not have the same.
    """
    producer = after.producer()
    node = ir.node(
        op_type,
        inputs,
        attributes,
        domain=domain,
        name=f"{after.name}.{suffix}",
        metadata_props={} if producer is None else dict(producer.metadata_props),
    )
    result = node.outputs[0]
    result.name, result.shape, result.type = node.name, after.shape, after.type
    return node


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, graph outputs too, read `new`; an output keeps its name."""
    name, is_output = old.name, old.is_graph_output()
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if is_output:
        old.name = f"{name}.replaced"
        new.name = name


def remove_dead(graph: ir.Graph, values: Sequence[ir.Value | None]) -> None:
    """Remove what computes `values`, as far back as nothing else reads it, initializers too."""
    pending = [value for value in values if value is not None]
    while pending:
        value = pending.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and value.name is not None:
                graph.initializers.pop(value.name, None)
            continue
        if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        inputs = [item for item in node.inputs if item is not None]
        graph.remove(node, safe=True)
        pending.extend(inputs)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that holds `node`.

    Raises:
        NoMatch: It is in a function body, which the passes leave alone.
    """
    if not isinstance(node.graph, ir.Graph):
        raise NoMatch("it is not in the main graph")
    return node.graph
