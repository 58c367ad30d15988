"""Faults that a pass can make, planted in a graph that some passes have changed.

Each function changes the graph in place. Shapes: B batch, N key/value heads, G query heads of each,
S new tokens, T capacity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tests.parity.mutants import insert, integers, mask_use, positions_along, producer

from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.branches import branches


def _output(model: ir.Model, name: str) -> Any:
    return next(value for value in model.graph.outputs if value.name == name)


def _values_made_by(model: ir.Model, layer: int, *ops: str) -> Any:
    """The node of such a type from which a layer's new values come."""
    node = _output(model, f"present.{layer}.value").producer()
    node = producer(node, 1)
    while node.op_type not in ops:
        node = producer(node, 0)
    return node


def _exchange(value: Any, other: Any) -> None:
    """Let what reads one of two values read the other one."""
    uses, others = list(value.uses()), list(other.uses())
    for use in uses:
        use.node.replace_input_with(use.idx, other)
    for use in others:
        use.node.replace_input_with(use.idx, value)


def scale_scores(model: ir.Model, layer: int, factor: float) -> None:
    """The scores of one layer are multiplied by `factor`."""
    add = mask_use(model, layer)
    scaled = insert(add, "Mul", [add.inputs[0], np.array(factor, np.float32)])
    scaled.type, scaled.shape = add.inputs[0].type, add.inputs[0].shape
    add.replace_input_with(0, scaled)


def swap_cached_heads(model: ir.Model, layer: int, projection: str) -> None:
    """One layer's two key/value heads are exchanged in one projection."""
    weight = model.graph.initializers[f"model.layers.{layer}.self_attn.{projection}.weight"]
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    half = values.shape[1] // 2
    weight.const_value = ir.Tensor(np.roll(values, half, axis=1), name=weight.name)


def use_wrong_source(model: ir.Model, follower: int, source: int) -> None:
    """One follower reads another source's probabilities, in both branches."""
    attention = find_attention(model.graph, follower)
    wrong = find_attention(model.graph, source).probabilities
    for branch in branches(attention.context):
        for node in branch:
            for index, value in enumerate(node.inputs):
                if value is attention.probabilities:
                    node.replace_input_with(index, wrong)


def change_epsilon(model: ir.Model, layer: int, factor: float) -> None:
    """The epsilon of the norm in front of a layer's attention is multiplied by `factor`."""
    weight = model.graph.initializers[f"model.layers.{layer}.input_layernorm.weight"]
    (use,) = weight.uses()
    epsilon = use.node.attributes["epsilon"].as_float()
    use.node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * factor)


def forget_norm_weight(model: ir.Model, layer: int) -> None:
    """The norm behind a layer's attention has no weight."""
    weight = model.graph.initializers[f"model.layers.{layer}.post_attention_layernorm.weight"]
    assert weight.const_value is not None
    ones = np.ones_like(weight.const_value.numpy())
    weight.const_value = ir.Tensor(ones, name=weight.name)


def pair_neighbours(model: ir.Model, layer: int) -> None:
    """One layer's keys are rotated in neighbouring pairs instead of halves."""
    rotation = producer(_output(model, f"present.{layer}.key").producer(), 1)
    assert rotation.op_type == "RotaryEmbedding"
    rotation.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def exchange_keys_and_values(model: ir.Model, layer: int) -> None:
    """The keys' and the values' part of a layer's packed product are exchanged."""
    _, keys, values = _values_made_by(model, layer, "Split").outputs
    _exchange(keys, values)


def exchange_gate_and_up(model: ir.Model, layer: int) -> None:
    """The two parts of the packed product in a layer's MLP are exchanged."""
    activations: list[Any] = [node for node in model.graph if node.op_type == "Sigmoid"]
    gate, up = producer(activations[layer], 0).outputs
    _exchange(gate, up)


def swap_rotated_groups(model: ir.Model, layer: int) -> None:
    """The queries of the first key/value head go to the second one, and the other way round."""
    split = producer(_output(model, f"present.{layer}.key").producer(), 1)
    assert split.op_type == "Split"
    queries = split.outputs[0]
    (use,) = queries.uses()
    one, two = insert(use.node, "Split", [queries], outputs=2, axis=1, num_outputs=2)
    swapped = insert(use.node, "Concat", [two, one], axis=1)
    swapped.type, swapped.shape = queries.type, queries.shape
    use.node.replace_input_with(use.idx, swapped)


def scale_block(model: ir.Model, layer: int, factor: float) -> None:
    """The scale of the last block of a layer's quantised value projection is wrong."""
    scales = _values_made_by(model, layer, "MatMulNBits").inputs[2]
    values = scales.const_value.numpy().copy()
    values.reshape(-1)[-1] *= factor
    scales.const_value = ir.Tensor(values, name=scales.name)


def scale_row(model: ir.Model, every: int, factor: float) -> None:
    """Of every few tokens, the scales in the table of embeddings are wrong."""
    (lookup,) = (node for node in model.graph if node.op_type == "GatherBlockQuantized")
    scales: Any = lookup.inputs[2]
    values = scales.const_value.numpy().copy()
    values[::every] *= factor
    scales.const_value = ir.Tensor(values, name=scales.name)


def ignore_wanted_rows(model: ir.Model) -> None:
    """The residual stream is looked up in the first row, whatever rows are wanted."""
    residual = next(
        node
        for node in model.graph
        if node.op_type == "GatherElements"
        and any(use.node.op_type.startswith("Skip") for use in node.outputs[0].uses())
    )
    first = insert(residual, "Mul", [residual.inputs[1], np.array(0)])
    residual.replace_input_with(1, first)


def _split_scores(model: ir.Model, layer: int) -> tuple[ir.Graph, ir.Graph]:
    """A source's branches up to the probabilities: for one token, and for many."""
    probabilities: Any = find_attention(model.graph, layer).probabilities
    split = producer(probabilities.producer(), 0)
    assert split.op_type == "If"
    return branches(split)


def _the(graph: ir.Graph, op: str) -> Any:
    (node,) = (node for node in graph if node.op_type == op)
    return node


def scale_one_token(model: ir.Model, layer: int, factor: float) -> None:
    """The scores of one layer are multiplied by `factor` in calls with one new token."""
    product = _the(_split_scores(model, layer)[0], "FusedMatMul")
    alpha = product.attributes["alpha"].as_float()
    product.attributes["alpha"] = ir.AttrFloat32("alpha", alpha * factor)


def scale_many_tokens(model: ir.Model, layer: int, factor: float) -> None:
    """The scores of one layer are multiplied by `factor` in calls with more new tokens."""
    scale = _the(_split_scores(model, layer)[1], "Mul")
    scaled = insert(scale, "Mul", [scale.inputs[1], np.array(factor, np.float32)])
    scale.replace_input_with(1, scaled)


def swap_one_tokens_heads(model: ir.Model, layer: int) -> None:
    """The context of a layer's first two query heads is exchanged in calls with one new token."""
    context = find_attention(model.graph, layer).context
    turned = _the(branches(context)[0], "Transpose")
    (result,) = branches(context)[0].outputs
    assert result is turned.outputs[0]
    product = turned.inputs[0]
    one, two = insert(turned, "Split", [product], outputs=2, axis=3, num_outputs=2)
    turned.replace_input_with(0, insert(turned, "Concat", [two, one], axis=3))


def forget_behind_slot(model: ir.Model, layer: int, slot: int) -> None:
    """Calls with one new token do not see what lies at `slot` or behind it, in one layer."""
    add = _the(_split_scores(model, layer)[0], "Add")
    columns = positions_along(add, add.inputs[1], 3)
    kept = insert(add, "Less", [columns, np.array(slot)])
    low = np.array(np.finfo(np.float32).min)
    add.replace_input_with(1, insert(add, "Where", [kept, add.inputs[1], low]))


def widen_window(model: ir.Model, layer: int, window: int, *, one_token: bool) -> None:
    """One layer sees one token more than its window, in calls with one new token or with more."""
    add = _the(_split_scores(model, layer)[0 if one_token else 1], "Add")
    lengths: Any = next(value for value in model.graph.inputs if value.name == "past_lengths")
    rows = insert(add, "Unsqueeze", [positions_along(add, add.inputs[1], 2), integers(1)])
    starts = insert(add, "Unsqueeze", [lengths, integers(1, 2, 3)])
    first = insert(add, "Sub", [insert(add, "Add", [starts, rows]), np.array(window)])
    columns = positions_along(add, add.inputs[1], 3)
    seen = insert(add, "Equal", [columns, first])
    add.replace_input_with(1, insert(add, "Where", [seen, np.array(0, np.float32), add.inputs[1]]))


def write_one_token_early(model: ir.Model, name: str) -> None:
    """One cache is written at the place before its own, except in a row's first call."""
    scatter = _output(model, name).producer()
    lengths = scatter.inputs[2]
    shift = insert(
        scatter,
        "Cast",
        [insert(scatter, "Greater", [lengths, np.array(0)])],
        to=ir.DataType.INT64,
    )
    scatter.replace_input_with(2, insert(scatter, "Sub", [lengths, shift]))
