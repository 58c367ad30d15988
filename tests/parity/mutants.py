"""Faults that an exporter, a pass or a plan can have, planted in a correct graph.

Each function changes a traced graph of a sliding-window model in place. Shapes: B batch, H query
heads, S new tokens, T capacity.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.attention import find_attention

_NUMBERS = itertools.count()


def insert(before: Any, op: str, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Insert a node, in a branch too, and give its output(s); numpy arrays become initializers."""
    graph = before.graph
    values = []
    for item in inputs:
        if isinstance(item, np.ndarray):
            tensor = ir.Tensor(item, name=f"mutant.{next(_NUMBERS)}")
            item = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape),
                const_value=tensor,
            )
            graph.register_initializer(item)
        values.append(item)
    outputs = attributes.pop("outputs", 1)
    node = ir.node(op, values, attributes, num_outputs=outputs)
    for output in node.outputs:
        # Never that of a node in another graph, which may hold this one
        output.name = f"mutant.{next(_NUMBERS)}"
    graph.insert_before(before, node)
    return node.outputs[0] if outputs == 1 else node.outputs


def integers(*values: int) -> np.ndarray:
    """One axis of them."""
    return np.array(values, np.int64)


def swap_probability_heads(model: ir.Model, layer: int) -> None:
    """Two query heads of one group give each other their probabilities, in one layer."""
    attention = find_attention(model.graph, layer)
    at = attention.context
    one, other = insert(at, "Split", [attention.probabilities], outputs=2, axis=1, num_outputs=2)
    first, second = insert(at, "Split", [one], outputs=2, axis=2, num_outputs=2)
    swapped = insert(at, "Concat", [second, first], axis=2)
    at.replace_input_with(0, insert(at, "Concat", [swapped, other], axis=1))


def swap_output_heads(model: ir.Model, layer: int, head_dim: int) -> None:
    """Two heads' inputs of one layer's output projection are swapped."""
    weight = model.graph.initializers[f"model.layers.{layer}.self_attn.o_proj.weight"]
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values[: 2 * head_dim] = np.roll(values[: 2 * head_dim], head_dim, axis=0)
    weight.const_value = ir.Tensor(values, name=weight.name)


def producer(node: Any, index: int) -> Any:
    return node.inputs[index].producer()


def mask_use(model: ir.Model, layer: int) -> Any:
    """The Add of scores [B, H, S, T] and mask of a source layer."""
    probabilities: Any = find_attention(model.graph, layer).probabilities
    softmax = probabilities.producer().inputs[0].producer()
    assert softmax.op_type == "Softmax"
    add = softmax.inputs[0].producer()
    assert add.op_type == "Add"
    return add


def positions_along(at: Any, value: Any, axis: int) -> Any:
    """0, 1, 2, … along an axis of `value`."""
    size = insert(at, "Shape", [value], start=axis, end=axis + 1)
    stop = insert(at, "Squeeze", [size, integers(0)])
    return insert(at, "Range", [np.array(0), stop, np.array(1)])


def drop_mask_row(model: ir.Model, layer: int, row: int) -> None:
    """The token number `row` of each call sees everything, in one layer."""
    add = mask_use(model, layer)
    rows = insert(add, "Unsqueeze", [positions_along(add, add.inputs[1], 2), integers(1)])
    seen = insert(add, "Equal", [rows, np.array(row)])
    add.replace_input_with(1, insert(add, "Where", [seen, np.array(0, np.float32), add.inputs[1]]))


def see_one_future_token(model: ir.Model, layer: int, row: int) -> None:
    """The token number `row` of each call sees cache slot `row + 1`, in one layer."""
    add = mask_use(model, layer)
    rows = insert(add, "Unsqueeze", [positions_along(add, add.inputs[1], 2), integers(1)])
    columns = positions_along(add, add.inputs[1], 3)
    seen = insert(
        add,
        "And",
        [
            insert(add, "Equal", [rows, np.array(row)]),
            insert(add, "Equal", [columns, np.array(row + 1)]),
        ],
    )
    add.replace_input_with(1, insert(add, "Where", [seen, np.array(0, np.float32), add.inputs[1]]))


def shift_window(model: ir.Model, window: int, by: int) -> None:
    """Every layer's window is `by` tokens wider."""
    nodes: list[Any] = [node for node in model.graph if node.op_type == "Sub"]
    subtracted = [node.inputs[1].const_value for node in nodes]
    (node,) = (
        node
        for node, constant in zip(nodes, subtracted, strict=True)
        if constant is not None and constant.numpy().tolist() == window
    )
    node.replace_input_with(1, insert(node, "Add", [node.inputs[1], np.array(by)]))


def use_wrong_source(model: ir.Model, follower: int, source: int) -> None:
    """One follower reads another source's probabilities."""
    wrong = find_attention(model.graph, source).probabilities
    find_attention(model.graph, follower).context.replace_input_with(0, wrong)


def _rotary_cast(model: ir.Model) -> Any:
    """The Cast of positions [B, S, 1] that the rotary angles are computed from."""
    frequencies = model.graph.initializers["model.rotary_emb.inv_freq"]
    (angles,) = (use.node for use in frequencies.uses())
    cast: Any = producer(angles, 0)
    assert cast.op_type == "Cast"
    return cast


def rotate_one_token_further(model: ir.Model, row: int) -> None:
    """The rotary position of the token number `row` of each call is one too large."""
    cast = _rotary_cast(model)
    rows = insert(cast, "Unsqueeze", [positions_along(cast, cast.inputs[0], 1), integers(1)])
    extra = insert(
        cast, "Cast", [insert(cast, "Equal", [rows, np.array(row)])], to=ir.DataType.INT64
    )
    cast.replace_input_with(0, insert(cast, "Add", [cast.inputs[0], extra]))


def rotate_decoded_tokens_further(model: ir.Model) -> None:
    """Rotary positions are one too large in calls with one new token."""
    cast = _rotary_cast(model)
    size = insert(cast, "Shape", [cast.inputs[0]], start=1, end=2)
    extra = insert(cast, "Cast", [insert(cast, "Equal", [size, integers(1)])], to=ir.DataType.INT64)
    cast.replace_input_with(0, insert(cast, "Add", [cast.inputs[0], extra]))


def mask_by_longest_row(model: ir.Model) -> None:
    """Every row of a batch may see as far as its longest row."""
    (node,) = (n for n in model.graph if n.op_type == "LessOrEqual")
    longest = insert(node, "ReduceMax", [node.inputs[1], integers(0)], keepdims=1)
    node.replace_input_with(1, longest)


def write_to_first_rows_place(model: ir.Model, layer: int) -> None:
    """All rows write one layer's values where the first row does."""
    scatter = producer(producer(find_attention(model.graph, layer).context, 1), 0)
    lengths = scatter.inputs[2]
    first = insert(scatter, "Slice", [lengths, integers(0), integers(1), integers(0)])
    shape = insert(scatter, "Shape", [lengths])
    scatter.replace_input_with(2, insert(scatter, "Expand", [first, shape]))


def forget_after_bucket(model: ir.Model, layer: int, capacity: int) -> None:
    """Cache slots from `capacity` on are hidden in one layer."""
    add = mask_use(model, layer)
    columns = positions_along(add, add.inputs[1], 3)
    kept = insert(add, "Less", [columns, np.array(capacity)])
    low = np.array(np.finfo(np.float32).min)
    add.replace_input_with(1, insert(add, "Where", [kept, add.inputs[1], low]))


def sort_wanted_rows(model: ir.Model) -> None:
    """Logits come in the order of their positions, not in the order that was asked for."""
    wanted: Any = next(value for value in model.graph.inputs if value.name == "logits_indices")
    readers = list(wanted.uses())
    size = insert(readers[0].node, "Shape", [wanted], start=1, end=2)
    ascending, _ = insert(readers[0].node, "TopK", [wanted, size], outputs=2, largest=0)
    for node, index in readers:
        node.replace_input_with(index, ascending)


def raise_epsilon(model: ir.Model) -> None:
    """One norm's epsilon is half as large again: a difference of rounding, not of meaning."""
    mean = next(node for node in model.graph if node.op_type == "ReduceMean")
    (add,) = (use.node for use in mean.outputs[0].uses())
    raised = insert(add, "Mul", [add.inputs[1], np.array(1.5, np.float32)])
    add.replace_input_with(1, raised)


def scale_weight(model: ir.Model, name: str, factor: float) -> None:
    """A weight is multiplied by `factor`."""
    weight = model.graph.initializers[name]
    assert weight.const_value is not None
    scaled = weight.const_value.numpy() * np.float32(factor)
    weight.const_value = ir.Tensor(scaled, name=name)
