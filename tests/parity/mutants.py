"""Faults that an exporter, a pass or a plan can have, planted in a correct graph.

Each function changes a traced graph of a sliding-window model in place. Shapes: B batch, H query
heads, S new tokens, T capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.attention import find_attention


def _new(before: Any, op: str, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Insert a node and give its output(s); numpy arrays become initializers."""
    graph = before.graph
    values = []
    for item in inputs:
        if isinstance(item, np.ndarray):
            tensor = ir.Tensor(item, name=f"mutant.{len(graph.initializers)}")
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
    graph.insert_before(before, node)
    return node.outputs[0] if outputs == 1 else node.outputs


def _int(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _use(node: Any, index: int, value: Any) -> None:
    node.replace_input_with(index, value)


def swap_probability_heads(model: ir.Model, layer: int) -> None:
    """Two query heads of one group give each other their probabilities, in one layer."""
    attention = find_attention(model.graph, layer)
    at = attention.context
    one, other = _new(at, "Split", [attention.probabilities], outputs=2, axis=1, num_outputs=2)
    first, second = _new(at, "Split", [one], outputs=2, axis=2, num_outputs=2)
    swapped = _new(at, "Concat", [second, first], axis=2)
    _use(at, 0, _new(at, "Concat", [swapped, other], axis=1))


def swap_output_heads(model: ir.Model, layer: int, head_dim: int) -> None:
    """Two heads' inputs of one layer's output projection are swapped."""
    weight = model.graph.initializers[f"model.layers.{layer}.self_attn.o_proj.weight"]
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values[: 2 * head_dim] = np.roll(values[: 2 * head_dim], head_dim, axis=0)
    weight.const_value = ir.Tensor(values, name=weight.name)


def _producer(node: Any, index: int) -> Any:
    return node.inputs[index].producer()


def _mask_use(model: ir.Model, layer: int) -> Any:
    """The Add of scores [B, H, S, T] and mask of a source layer."""
    probabilities: Any = find_attention(model.graph, layer).probabilities
    softmax = probabilities.producer().inputs[0].producer()
    assert softmax.op_type == "Softmax"
    add = softmax.inputs[0].producer()
    assert add.op_type == "Add"
    return add


def _positions_along(at: Any, value: Any, axis: int) -> Any:
    """0, 1, 2, … along an axis of `value`."""
    size = _new(at, "Shape", [value], start=axis, end=axis + 1)
    return _new(at, "Range", [np.array(0), _new(at, "Squeeze", [size, _int(0)]), np.array(1)])


def drop_mask_row(model: ir.Model, layer: int, row: int) -> None:
    """The token number `row` of each call sees everything, in one layer."""
    add = _mask_use(model, layer)
    rows = _new(add, "Unsqueeze", [_positions_along(add, add.inputs[1], 2), _int(1)])
    _use(
        add,
        1,
        _new(
            add,
            "Where",
            [_new(add, "Equal", [rows, np.array(row)]), np.array(0, np.float32), add.inputs[1]],
        ),
    )


def see_one_future_token(model: ir.Model, layer: int, row: int) -> None:
    """The token number `row` of each call sees cache slot `row + 1`, in one layer."""
    add = _mask_use(model, layer)
    rows = _new(add, "Unsqueeze", [_positions_along(add, add.inputs[1], 2), _int(1)])
    columns = _positions_along(add, add.inputs[1], 3)
    seen = _new(
        add,
        "And",
        [
            _new(add, "Equal", [rows, np.array(row)]),
            _new(add, "Equal", [columns, np.array(row + 1)]),
        ],
    )
    _use(add, 1, _new(add, "Where", [seen, np.array(0, np.float32), add.inputs[1]]))


def shift_window(model: ir.Model, window: int, by: int) -> None:
    """Every layer's window is `by` tokens wider."""
    nodes: list[Any] = [node for node in model.graph if node.op_type == "Sub"]
    subtracted = [node.inputs[1].const_value for node in nodes]
    (node,) = (
        node
        for node, constant in zip(nodes, subtracted, strict=True)
        if constant is not None and constant.numpy().tolist() == window
    )
    _use(node, 1, _new(node, "Add", [node.inputs[1], np.array(by)]))


def use_wrong_source(model: ir.Model, follower: int, source: int) -> None:
    """One follower reads another source's probabilities."""
    wrong = find_attention(model.graph, source).probabilities
    _use(find_attention(model.graph, follower).context, 0, wrong)


def _rotary_cast(model: ir.Model) -> Any:
    """The Cast of positions [B, S, 1] that the rotary angles are computed from."""
    frequencies = model.graph.initializers["model.rotary_emb.inv_freq"]
    (angles,) = (use.node for use in frequencies.uses())
    cast: Any = _producer(angles, 0)
    assert cast.op_type == "Cast"
    return cast


def rotate_one_token_further(model: ir.Model, row: int) -> None:
    """The rotary position of the token number `row` of each call is one too large."""
    cast = _rotary_cast(model)
    rows = _new(cast, "Unsqueeze", [_positions_along(cast, cast.inputs[0], 1), _int(1)])
    extra = _new(cast, "Cast", [_new(cast, "Equal", [rows, np.array(row)])], to=ir.DataType.INT64)
    _use(cast, 0, _new(cast, "Add", [cast.inputs[0], extra]))


def rotate_decoded_tokens_further(model: ir.Model) -> None:
    """Rotary positions are one too large in calls with one new token."""
    cast = _rotary_cast(model)
    size = _new(cast, "Shape", [cast.inputs[0]], start=1, end=2)
    extra = _new(cast, "Cast", [_new(cast, "Equal", [size, _int(1)])], to=ir.DataType.INT64)
    _use(cast, 0, _new(cast, "Add", [cast.inputs[0], extra]))


def mask_by_longest_row(model: ir.Model) -> None:
    """Every row of a batch may see as far as its longest row."""
    (node,) = (n for n in model.graph if n.op_type == "LessOrEqual")
    longest = _new(node, "ReduceMax", [node.inputs[1], _int(0)], keepdims=1)
    _use(node, 1, longest)


def write_to_first_rows_place(model: ir.Model, layer: int) -> None:
    """All rows write one layer's values where the first row does."""
    scatter = _producer(_producer(find_attention(model.graph, layer).context, 1), 0)
    lengths = scatter.inputs[2]
    first = _new(scatter, "Slice", [lengths, _int(0), _int(1), _int(0)])
    shape = _new(scatter, "Shape", [lengths])
    _use(scatter, 2, _new(scatter, "Expand", [first, shape]))


def forget_after_bucket(model: ir.Model, layer: int, capacity: int) -> None:
    """Cache slots from `capacity` on are hidden in one layer."""
    add = _mask_use(model, layer)
    columns = _positions_along(add, add.inputs[1], 3)
    kept = _new(add, "Less", [columns, np.array(capacity)])
    low = np.array(np.finfo(np.float32).min)
    _use(add, 1, _new(add, "Where", [kept, add.inputs[1], low]))


def sort_wanted_rows(model: ir.Model) -> None:
    """Logits come in the order of their positions, not in the order that was asked for."""
    wanted: Any = next(value for value in model.graph.inputs if value.name == "logits_indices")
    readers = list(wanted.uses())
    size = _new(readers[0].node, "Shape", [wanted], start=1, end=2)
    ascending, _ = _new(readers[0].node, "TopK", [wanted, size], outputs=2, largest=0)
    for node, index in readers:
        _use(node, index, ascending)


def double_epsilon(model: ir.Model) -> None:
    """One norm's epsilon is twice as large: a difference of rounding, not of meaning."""
    mean = next(node for node in model.graph if node.op_type == "ReduceMean")
    (add,) = (use.node for use in mean.outputs[0].uses())
    _use(add, 1, _new(add, "Add", [add.inputs[1], add.inputs[1]]))


def scale_weight(model: ir.Model, name: str, factor: float) -> None:
    """A weight is multiplied by `factor`."""
    weight = model.graph.initializers[name]
    assert weight.const_value is not None
    scaled = weight.const_value.numpy() * np.float32(factor)
    weight.const_value = ir.Tensor(scaled, name=name)
