"""Removes what followers no longer need: key caches, query/key projections, their weights."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph.attention import check_plan, find_attention
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.matching import given, shape_of
from echoatt_exporter.graph.properties import Property


class RemoveDeadBranches(GraphPass):
    """Removes the followers' query and key branches.

    A key cache is an output, so it keeps its layer's query/key branch alive although nobody reads
    the probabilities. The pass

    1. drops each follower's output `present.{l}.key`;
    2. lets a Shape of a follower's key cache, where the exporter happened to ask for the capacity,
       read the value cache, which has it too;
    3. removes every node and every initializer that no output needs any more;
    4. drops each follower's input `past_key_values.{l}.key`, which nothing reads then.

    A weight that also serves something alive stays; CutPackedWeights handles those.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PLAN_APPLIED})
    gives = frozenset({Property.NO_DEAD_KEYS})
    breaks = GraphPass.breaks | {Property.COLUMNS_CUT}

    def __init__(self, sources: Sequence[int]) -> None:
        """Take the plan.

        Args:
            sources: For each layer the layer whose probabilities it uses; a source names itself.
        """
        self._sources = tuple(sources)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the branches.

        Raises:
            PlanError: The plan does not fit the graph.
            ContractError: A follower still computes its own probabilities, or something besides
                its own key branch reads its key cache; the graph is as it was.
        """
        graph = model.graph
        plan = check_plan(graph, self._sources)
        for layer in plan.followers:
            source = find_attention(graph, plan.sources[layer])
            if find_attention(graph, layer).probabilities is not source.probabilities:
                raise ContractError(
                    f"layer {layer} does not read layer {source.layer}'s probabilities; "
                    "run RewireProbabilities first"
                )
        outputs = {f"present.{layer}.key" for layer in plan.followers}
        inputs = {f"past_key_values.{layer}.key" for layer in plan.followers}
        kept_outputs = [value for value in graph.outputs if value.name not in outputs]
        _refuse_key_readers(kept_outputs, inputs)
        modified = len(kept_outputs) != len(graph.outputs)
        graph.outputs[:] = kept_outputs
        _move_shapes(graph, plan.followers)
        modified = RemoveUnusedNodesPass()(model).modified or modified
        kept_inputs = [value for value in graph.inputs if value.name not in inputs]
        modified = len(kept_inputs) != len(graph.inputs) or modified
        graph.inputs[:] = kept_inputs
        return ir.passes.PassResult(model, modified=modified)


def _move_shapes(graph: ir.Graph, followers: Sequence[int]) -> None:
    """Let every Shape of a follower's key cache read its value cache."""
    inputs = {value.name: value for value in graph.inputs}
    for layer in followers:
        key = inputs.get(f"past_key_values.{layer}.key")
        for use in tuple(key.uses()) if key is not None else ():
            if use.node.op_type == "Shape":
                _move_shape(use.node, inputs[f"past_key_values.{layer}.value"])


def _move_shape(shape: ir.Node, value_cache: ir.Value) -> None:
    """Let a Shape of a key cache read a value cache, whose axes may lie in another order.

    Raises:
        ContractError: It asks for several axes that lie otherwise there.
    """
    mine, other = list(shape_of(given(shape.inputs[0]))), list(shape_of(value_cache))
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", len(mine))
    asked = mine[start:end]
    places = [i for i in range(len(other)) if other[i : i + len(asked)] == asked]
    if not places:
        raise ContractError(
            f"{shape.outputs[0].name} asks for axes {list(range(4)[start:end])} of a follower's key"
            " cache; export the model again with echoatt-export"
        )
    # The same place if it is one: sizes may be equal by chance
    place = start if start in places else places[0]
    shape.attributes["start"] = ir.AttrInt64("start", place)
    shape.attributes["end"] = ir.AttrInt64("end", place + len(asked))
    shape.replace_input_with(0, value_cache)


def _refuse_key_readers(outputs: Sequence[ir.Value], inputs: set[str]) -> None:
    """Check that no output depends on the contents of a follower's key cache."""
    seen: set[ir.Value] = set()
    pending = list(outputs)
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.name in inputs and value.is_graph_input():
            raise ContractError(
                f"{value.name} belongs to a follower, and an output besides its present key "
                "depends on it; export the model again with echoatt-export"
            )
        node = value.producer()
        if node is not None and node.op_type != "Shape":
            pending.extend(item for item in node.inputs if item is not None)
