"""Finding a layer's attention in a graph by the contract: by structure, not by names of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.errors import ContractError, PlanError
from echoatt_exporter.plan import SharingPlan


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Where a layer applies its attention probabilities.

    Attributes:
        layer: Its index.
        context: The MatMul of probabilities and values.
        probabilities: Its first operand, [batch, kv_heads, group*seq, capacity].
    """

    layer: int
    context: ir.Node
    probabilities: ir.Value


def find_attention(graph: ir.Graph, layer: int) -> LayerAttention:
    """Find the context MatMul of `layer`: the one whose second operand is `present.{layer}.value`.

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
    contexts = [
        use.node
        for use in value.uses()
        if use.node.op_type == "MatMul" and use.node.domain == "" and use.idx == 1
    ]
    if len(contexts) != 1:
        raise ContractError(
            f"layer {layer}: {len(contexts)} MatMul nodes have {name} as their second operand, "
            "expected one; export it again with echoatt-export"
        )
    probabilities = contexts[0].inputs[0]
    if probabilities is None:
        raise ContractError(f"layer {layer}: its context MatMul has no first operand")
    return LayerAttention(layer, contexts[0], probabilities)


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
