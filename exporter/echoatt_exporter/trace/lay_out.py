"""From a graph with one layer of each kind to the graph with all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from echoatt_exporter.graph.copy_nodes import copy_nodes
from echoatt_exporter.trace.layer_kinds import LayerKinds
from echoatt_exporter.trace.markers import DOMAIN, LAYER_INPUT, LAYER_OUTPUT, PROBABILITIES
from echoatt_runtime.contract import CacheSpec, Specification


@dataclass(frozen=True, slots=True)
class _Template:
    """One traced layer.

    Attributes:
        body: Its nodes, in graph order.
        hidden_in: The hidden states that it reads.
        hidden_out: The hidden states that it gives.
        caches: Its cache inputs and the values that become its cache outputs, by kind.
        weights: Its initializers, by their names inside the layer.
        lent: The probabilities that it lends, if it does.
        borrowed: The probabilities that it reads from another layer, if it does.
    """

    body: Sequence[ir.Node]
    hidden_in: ir.Value
    hidden_out: ir.Value
    caches: Mapping[str, tuple[ir.Value, ir.Value]]
    weights: Mapping[str, ir.Value]
    lent: ir.Value | None
    borrowed: ir.Value | None


def lay_out_layers(
    model: ir.Model,
    specification: Specification,
    kinds: LayerKinds,
    layers: nn.ModuleList,
    prefix: str,
) -> None:
    """Replace the traced templates by a copy of each layer's own, in place.

    Args:
        model: The trace of the templates, with markers, inputs and outputs named by layer.
        specification: What is to be built; it says what inputs and outputs there shall be.
        kinds: Which template each layer is a copy of.
        layers: All the decoder's layers, for their weights.
        prefix: What the templates' initializers begin with, up to their position in the trace.
    """
    graph = model.graph
    markers = {
        (node.op_type, node.attributes["layer"].as_int()): node
        for node in graph
        if node.domain == DOMAIN
    }
    templates = {
        layer: _template(
            graph,
            markers,
            [cache for cache in specification.caches if cache.layer == layer],
            f"{prefix}{position}.",
            kinds.sources[layer],
        )
        for position, layer in enumerate(kinds.templates)
    }
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    for template in templates.values():
        # Their names are wanted by the layers that take their place
        for weight in template.weights.values():
            del graph.initializers[str(weight.name)]
        for _, present in template.caches.values():
            present.name = f"template/{present.name}"
    hidden = markers[LAYER_INPUT, kinds.templates[0]].inputs[0]
    after = markers[LAYER_OUTPUT, kinds.templates[-1]].outputs[0]
    lent: dict[int, ir.Value] = {}
    new_nodes: list[ir.Node] = []

    for layer, module in enumerate(layers):
        template = templates[kinds.template_of[layer]]
        substitutes: dict[ir.Value, ir.Value | None] = {template.hidden_in: hidden}
        if template.borrowed is not None:
            substitutes[template.borrowed] = lent[specification.plan.sources[layer]]
        for name, (past, _) in template.caches.items():
            full_name = f"past_key_values.{layer}.{name}"
            # A template's own inputs stay: batch and capacity are read off one of them
            if full_name not in inputs:
                inputs[full_name] = ir.Value(name=full_name, type=past.type, shape=past.shape)
            substitutes[past] = inputs[full_name]
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, weight in template.weights.items():
            full_name = f"{prefix}{layer}.{name}"
            tensor = TorchTensor(tensors[name].detach(), full_name)
            substitutes[weight] = ir.Value(
                name=full_name, type=weight.type, shape=weight.shape, const_value=tensor
            )
        new_nodes += copy_nodes(template.body, substitutes, f"layers.{layer}/")
        hidden = substitutes[template.hidden_out]
        for name, (_, present) in template.caches.items():
            value = substitutes[present]
            assert value is not None  # noqa: S101 - a copy gives what its original gives
            value.name = f"present.{layer}.{name}"
            outputs[value.name] = value
        if template.lent is not None:
            lent_value = substitutes[template.lent]
            assert lent_value is not None  # noqa: S101 - as above
            lent[layer] = lent_value
        for weight in template.weights.values():
            copied = substitutes[weight]
            assert copied is not None  # noqa: S101 - set above
            graph.register_initializer(copied)

    assert hidden is not None  # noqa: S101 - there is at least one layer
    ir.convenience.replace_all_uses_with(after, hidden)
    graph.extend(new_nodes)
    graph.inputs[:] = [inputs[name] for name in specification.input_names]
    graph.outputs[:] = [outputs[name] for name in specification.output_names]
    RemoveUnusedNodesPass()(model)
    graph.sort()
    graph.opset_imports.pop(DOMAIN, None)


def _template(
    graph: ir.Graph,
    markers: Mapping[tuple[str, int], ir.Node],
    caches: Sequence[CacheSpec],
    prefix: str,
    source: int,
) -> _Template:
    """The traced layer with these caches, whose probabilities are those of `source`."""
    layer = caches[0].layer
    hidden_in = markers[LAYER_INPUT, layer].outputs[0]
    hidden_out = markers[LAYER_OUTPUT, layer].inputs[0]
    lending = markers.get((PROBABILITIES, layer))
    lent = None if lending is None else lending.inputs[0]
    borrowed = None if source == layer else markers[PROBABILITIES, source].outputs[0]
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    buffers = {
        cache.kind: (inputs[cache.past_name], outputs[cache.present_name]) for cache in caches
    }
    weights = {
        name.removeprefix(prefix): value
        for name, value in graph.initializers.items()
        if name.startswith(prefix)
    }
    assert hidden_out is not None  # noqa: S101 - a marker has one input
    own = {hidden_in, *weights.values(), *(past for past, _ in buffers.values())}
    if borrowed is not None:
        own.add(borrowed)
    targets = [hidden_out, *(present for _, present in buffers.values())]
    return _Template(
        body=_between(graph, own, targets),
        hidden_in=hidden_in,
        hidden_out=hidden_out,
        caches=buffers,
        weights=weights,
        lent=lent,
        borrowed=borrowed,
    )


def _between(graph: ir.Graph, own: set[ir.Value], targets: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes on the way from a layer's own inputs and weights to what it gives.

    What does not depend on them (masks, rotary angles, sizes) is computed once for all layers. No
    way leads through a marker.
    """
    reached = set(own)
    forward: set[ir.Node] = set()
    for node in graph:
        if node.domain == DOMAIN or node.op_type == "Shape":
            continue
        if any(value in reached for value in node.inputs):
            forward.add(node)
            reached.update(node.outputs)
    backward: set[ir.Node] = set()
    pending = list(targets)
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer in forward and producer not in backward:
            backward.add(producer)
            pending.extend(value for value in producer.inputs if value is not None)
    return [node for node in graph if node in backward]
