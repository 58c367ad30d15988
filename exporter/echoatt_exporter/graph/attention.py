"""Finding a layer's attention in a graph by the contract: by structure, not by names of nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph.branches import captured
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import PlanError


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Where a layer applies its attention probabilities.

    Attributes:
        layer: Its index.
        context: The MatMul of probabilities and values, or SplitDecode's If around it.
        probabilities: What it multiplies, [batch, kv_heads, group*seq, capacity].
    """

    layer: int
    context: ir.Node
    probabilities: ir.Value


def find_attention(graph: ir.Graph, layer: int) -> LayerAttention:
    """Find where `layer` multiplies by its values, which are `present.{layer}.value`.

    The values may lie as the product takes them, [.., capacity, head size], or transposed.

    Raises:
        ContractError: There is no such cache, or not exactly one such MatMul.
    """
    name = f"present.{layer}.value"
    value = next((output for output in graph.outputs if output.name == name), None)
    if value is None:
        raise ContractError(
            f"layer {layer}: the graph has no output {name}; export it again with echoatt-export"
        )
    scatter = value.producer()
    if scatter is None or scatter.op_type != "TensorScatter":
        found = "nothing" if scatter is None else scatter.op_type
        raise ContractError(
            f"layer {layer}: {name} is written by {found} and not by TensorScatter; "
            "export it again with echoatt-export"
        )
    contexts = [*_products(graph, value), *_split_products(graph, value)]
    if len(contexts) != 1:
        raise ContractError(
            f"layer {layer}: {len(contexts)} MatMul nodes have {name} as their second operand,"
            " expected one; export it again with echoatt-export"
        )
    context, probabilities = contexts[0]
    if probabilities is None:
        raise ContractError(
            f"layer {layer}: its context has no probabilities, or other ones in each branch; "
            "export it again with echoatt-export"
        )
    return LayerAttention(layer, context, probabilities)


def _products(graph: ir.Graph, cache: ir.Value) -> Iterator[tuple[ir.Node, ir.Value | None]]:
    """MatMul nodes of the main graph by the cache, each with its first operand."""
    for node, operand in products_by(cache):
        if node.graph is graph:
            yield node, operand


def products_by(cache: ir.Value) -> Iterator[tuple[ir.Node, ir.Value | None]]:
    """MatMul nodes whose second operand is a cache, as it lies or transposed, and their first."""
    views = [cache]
    for view in views:
        for node, index in view.uses():
            if node.op_type == "Transpose":
                views.append(node.outputs[0])
            elif node.op_type == "MatMul" and node.domain == "" and index == 1:
                yield node, node.inputs[0]


def _split_products(graph: ir.Graph, cache: ir.Value) -> Iterator[tuple[ir.Node, ir.Value | None]]:
    """If nodes whose branches read the cache, each with the only other value that both read."""
    for node in graph:
        if node.op_type == "If" and any(cache in values for values in captured(node)):
            one, many = (values - {cache} for values in captured(node))
            yield node, next(iter(one)) if one == many and len(one) == 1 else None


def check_plan(graph: ir.Graph, sources: Sequence[int]) -> SharingPlan:
    """The plan, if it is one and has the graph's number of layers.

    Raises:
        PlanError: It contradicts itself, or has another number of layers.
    """
    plan = SharingPlan(tuple(sources))
    plan.validate()
    names = {output.name for output in graph.outputs}
    layers = 0
    while f"present.{layers}.value" in names:
        layers += 1
    if layers != plan.num_layers:
        raise PlanError(
            f"the sharing plan has {plan.num_layers} layers and the graph {layers}; "
            "give a plan with one source a layer"
        )
    return plan
