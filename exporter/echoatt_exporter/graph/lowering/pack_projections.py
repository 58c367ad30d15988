"""Packs projections of one input into one matrix product."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import GraphPass
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
from echoatt_exporter.graph.roles import join_roles, role_of, set_role
from echoatt_exporter.graph.weights import add_constant, add_lazy, joined_name, weight_of

logger = logging.getLogger(__name__)


class PackProjections(GraphPass):
    """Replaces several MatMul of one input by one MatMul and a Split.

    Query, key and value, or gate and up, read the same input: one product starts fewer kernels and
    reads the input once. The pass acts on two or more MatMul nodes that read one value as their
    first operand and whose second operands are constant [K, N] weights of one element type that
    nothing else reads,

    1. each followed by an Add of a constant vector [N] (qwen2): the vectors are packed too, and one
       Add follows the packed product;
    2. none, or only some, followed by such an Add: the Adds stay behind the Split. A vector of
       zeros for the others would cost what the packing gains.

    It leaves alone products of two activations, weights that something else reads too (packing
    would store them twice) and inputs with one projection. The packed weight is put together when
    it is written, not now.
    """

    needs = frozenset(
        {
            Property.NO_BRANCHES,
            Property.NORMS_FUSED,
            Property.ROTARY_FUSED,
            Property.PLAN_APPLIED,
            Property.NO_DEAD_KEYS,
            Property.COLUMNS_CUT,
        }
    )
    gives = frozenset({Property.PACKED})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack every group of projections."""
        modified = False
        for group in _groups(model.graph):
            _pack(model.graph, group)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


@dataclass(frozen=True, slots=True)
class _Projection:
    """A MatMul with a constant weight [K, N], and its bias [N] if one follows."""

    node: ir.Node
    weight: ir.Value
    columns: int
    add: ir.Node | None
    bias: ir.Value | None


def _groups(graph: ir.Graph) -> Iterator[list[_Projection]]:
    """Projections of the same input and weight type, two or more each, in graph order."""
    groups: dict[tuple[ir.Value, ir.DataType | None], list[_Projection]] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.domain != "":
            continue
        try:
            projection = _match(node)
        except NoMatch as reason:
            logger.debug("PackProjections left %s alone: %s", node.name, reason)
            continue
        key = (given(node.inputs[0]), projection.weight.dtype)
        groups.setdefault(key, []).append(projection)
    for group in groups.values():
        if len(group) > 1:
            yield group
        else:
            logger.debug("PackProjections left %s alone: no other", group[0].node.name)


def _match(node: ir.Node) -> _Projection:
    """See a MatMul as a projection."""
    graph_of(node)
    weight = given(node.inputs[1])
    columns = weight_of(weight, rank=2).shape[1]
    assert isinstance(columns, int)  # noqa: S101 - tensors have fixed shapes
    need(len(weight.uses()) == 1, f"{weight.name} is used elsewhere too")
    uses = tuple(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        add = uses[0].node
        bias = given(add.inputs[1 - uses[0].idx])
        if bias.is_initializer() and bias.shape is not None and list(bias.shape) == [columns]:
            return _Projection(node, weight, columns, add, bias)
    return _Projection(node, weight, columns, None, None)


def _pack(graph: ir.Graph, group: Sequence[_Projection]) -> None:
    """Replace a group by one product."""
    first = group[0].node
    with_bias = all(projection.bias is not None for projection in group)
    packed_weight = _concatenated(graph, [projection.weight for projection in group], axis=1)
    product = new_node(
        "MatMul", [first.inputs[0], packed_weight], after=first.outputs[0], suffix="packed"
    )
    nodes = [product]
    if with_bias:
        bias = _concatenated(graph, [given(projection.bias) for projection in group], axis=0)
        nodes.append(
            new_node("Add", [product.outputs[0], bias], after=first.outputs[0], suffix="biased")
        )
    sizes = np.array([projection.columns for projection in group], np.int64)
    sum_of_sizes = int(sizes.sum())
    for node in nodes:
        if node.outputs[0].shape is not None:
            node.outputs[0].shape = ir.Shape([*list(node.outputs[0].shape)[:-1], sum_of_sizes])
    name = f"{first.outputs[0].name}.sizes"
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], add_constant(graph, name, sizes)],
        {"axis": -1},
        num_outputs=len(group),
        name=f"{first.outputs[0].name}.split",
    )
    nodes.append(split)
    # Where the first product stood: the input is there, all else is constant
    graph.insert_before(first, nodes)
    for projection, output in zip(group, split.outputs, strict=True):
        old = projection.node if not with_bias or projection.add is None else projection.add
        output.name = f"{old.outputs[0].name}.part"
        replace(old.outputs[0], output)
        remove_dead(graph, [old.outputs[0]])


def _concatenated(graph: ir.Graph, values: Sequence[ir.Value], axis: int) -> ir.Value:
    """An initializer that joins others, named after all of them."""
    tensors = [weight_of(value) for value in values]
    shape = tensors[0].shape.numpy()
    columns = [int(tensor.shape.numpy()[axis]) for tensor in tensors]
    new_shape = [sum(columns) if index == axis else dim for index, dim in enumerate(shape)]
    packed = add_lazy(
        graph,
        joined_name([str(value.name) for value in values]),
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=axis),
        tensors[0].dtype,
        new_shape,
    )
    set_role(packed, join_roles(zip(map(role_of, values), columns, strict=True)))
    return packed
