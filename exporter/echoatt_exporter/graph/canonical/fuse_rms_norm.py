"""Recognises RMSNorm in the elementary operators that PyTorch's exporter leaves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
    constant,
    given,
    graph_of,
    integers,
    last_axis,
    made_by,
    need,
    new_node,
    only_used_by,
    remove_dead,
    replace,
    scalar,
    shape_of,
    static_dim,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.weights import add_constant, weight_of

_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class FuseRmsNorm(RewritePass):
    """Replaces x * rsqrt(mean(x²) + epsilon) * weight by one `RMSNormalization` (ai.onnx 23).

    ONNX Runtime has fused kernels for it on CPU (float32, float16) and CUDA (also bfloat16), and
    `onnx.checker` knows it, which it does not the older `SimplifiedLayerNormalization`. The square
    may be Pow or Mul, the root Reciprocal or Div, and every operand order is recognised. The pass
    acts on

    1. a norm that is computed in one element type throughout;
    2. a norm that is computed in float32 between Casts from and to a half type, with the weight
       applied after the Cast back (llama's form): fused in the half type, where the operator still
       accumulates in float32;
    3. the same with the weight applied in float32 before the Cast back (olmo2's form), if every
       element of the weight fits the half type exactly: fused in the half type;
    4. the same if they do not fit (gemma's form, 1 + weight): fused in float32, the Casts stay, for
       rounding 1 + weight would lose what gemma takes care to keep.

    A weight that is still an expression (Cast of a parameter, parameter + 1) becomes an
    initializer. The pass refuses a mean over another axis, without kept dimensions, another
    exponent, an epsilon that is not constant, different inputs to square and multiplication, and
    an intermediate value that something else needs.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.COMPUTED_ONCE})
    gives = frozenset({Property.NORMS_FUSED})
    roots = frozenset({("", "ReduceMean")})

    def rewrite(self, node: ir.Node) -> None:
        """Fuse the norm around one ReduceMean."""
        graph = graph_of(node)
        x, epsilon, normalized = _match_core(node)
        scaled, scale = _match_scale(normalized)
        need(len(shape_of(x)) > 0, "it normalises a scalar")
        need(len(scale) == static_dim(x, -1), "the weight does not span the normalised axis")
        cast_in = x.producer()
        half = None
        if cast_in is not None and cast_in.op_type == "Cast" and x.dtype == ir.DataType.FLOAT:
            source = given(cast_in.inputs[0])
            half = source if source.dtype in _HALF_TYPES else None

        result = scaled
        if normalized.dtype == x.dtype and scaled.dtype == x.dtype:
            cast_out = _cast_after(scaled, half.dtype) if half is not None else None
            if half is not None and cast_out is not None and _fits(scale, half.dtype):
                x, result = half, cast_out
        elif half is not None and scaled.dtype == half.dtype:
            x = half
        else:
            raise NoMatch(f"it goes from {x.dtype} to {scaled.dtype}")
        assert x.dtype is not None  # noqa: S101 - compared with known types above
        last = result.producer()
        assert last is not None  # noqa: S101 - Mul or Cast
        weight = _weight_value(graph, scaled, scale.astype(x.dtype.numpy()))
        fused = new_node(
            "RMSNormalization",
            [x, weight],
            {"axis": -1, "epsilon": epsilon},
            after=result,
            suffix="rms_norm",
        )
        graph.insert_before(last, fused)
        replace(result, fused.outputs[0])
        remove_dead(graph, [result])


def _match_core(mean: ir.Node) -> tuple[ir.Value, float, ir.Value]:
    """Match x * rsqrt(mean(x²) + epsilon) around its ReduceMean: x, epsilon, and the product."""
    squared = given(mean.inputs[0])
    x = _square_of(squared)
    only_used_by(squared, mean)
    need(mean.attributes.get_int("keepdims", 1) == 1, "the mean does not keep its dimension")
    need(len(mean.inputs) == 2 and mean.inputs[1] is not None, "the mean names no axes")
    axes = integers(mean.inputs[1])
    need(len(axes) == 1 and last_axis(x, axes[0]), "the mean is not over the last axis")

    add = _sole_reader(mean.outputs[0], "Add")
    epsilon = scalar(_other(add, mean.outputs[0]))
    sqrt = _sole_reader(add.outputs[0], "Sqrt")
    root = sqrt.outputs[0]
    reader = _sole_reader(root, "Reciprocal", "Div")
    if reader.op_type == "Div":
        need(reader.inputs[1] is root, "the root is divided, not a divisor")
        if reader.inputs[0] is x:
            return x, epsilon, reader.outputs[0]
        need(scalar(reader.inputs[0]) == 1.0, "the root divides something else than x or 1")
    product = _sole_reader(reader.outputs[0], "Mul")
    need(
        _other(product, reader.outputs[0]) is x,
        "the square and the multiplication have different inputs",
    )
    return x, epsilon, product.outputs[0]


def _square_of(value: ir.Value) -> ir.Value:
    """The x of x²."""
    node = value.producer()
    if node is not None and node.op_type == "Mul" and node.domain == "":
        need(node.inputs[0] is node.inputs[1], "the mean is of a product, not of a square")
        return given(node.inputs[0])
    power = made_by(value, "Pow")
    need(scalar(power.inputs[1]) == 2.0, "the exponent is not 2")
    return given(power.inputs[0])


def _match_scale(normalized: ir.Value) -> tuple[ir.Value, np.ndarray]:
    """Match the multiplication by the weight, behind a Cast or not: its result, the weight [D]."""
    reader = _sole_reader(normalized, "Mul", "Cast")
    value = normalized
    if reader.op_type == "Cast":
        value = reader.outputs[0]
        reader = _sole_reader(value, "Mul")
    scale = _evaluate(_other(reader, value))
    need(scale.ndim == 1, "the weight is not a vector")
    return reader.outputs[0], scale


def _evaluate(value: ir.Value) -> np.ndarray:
    """Elements of a norm's weight: a parameter, behind Casts and additions of a constant."""
    node = value.producer()
    if node is None:
        return weight_of(value, rank=1).numpy()
    if node.op_type == "Cast" and value.dtype is not None:
        return _evaluate(given(node.inputs[0])).astype(value.dtype.numpy())
    if node.op_type == "Add":
        for index in (0, 1):
            operand = given(node.inputs[index])
            if operand.producer() is None and operand.shape is not None and len(operand.shape) == 0:
                added = constant(operand)
                base = _evaluate(given(node.inputs[1 - index]))
                return np.asarray(base + added.astype(base.dtype))
    raise NoMatch(f"the weight is computed by {node.op_type}")


def _weight_value(graph: ir.Graph, scaled: ir.Value, scale: np.ndarray) -> ir.Value:
    """The weight as an initializer: the one that is there, if it has these very elements."""
    product = scaled.producer()
    assert product is not None  # noqa: S101 - it is the Mul that was matched
    for operand in product.inputs:
        if (
            operand is not None
            and operand.is_initializer()
            and operand.const_value is not None
            and operand.dtype == ir.DataType.from_numpy(scale.dtype)
            and operand.const_value.shape == scale.shape
        ):
            return operand
    names = [operand.name for operand in product.inputs if operand is not None]
    return add_constant(graph, f"{names[0]}.scale", scale)


def _fits(scale: np.ndarray, dtype: ir.DataType | None) -> bool:
    """Whether `scale` can be held in `dtype` without rounding."""
    if dtype is None:
        return False
    return bool(np.array_equal(scale.astype(dtype.numpy()).astype(scale.dtype), scale))


def _cast_after(value: ir.Value, dtype: ir.DataType | None) -> ir.Value | None:
    """The result of the Cast to `dtype` that alone reads `value`; None without one."""
    uses = tuple(value.uses())
    if value.is_graph_output() or len(uses) != 1 or uses[0].node.op_type != "Cast":
        return None
    result = uses[0].node.outputs[0]
    return result if result.dtype == dtype else None


def _sole_reader(value: ir.Value, *op_types: str) -> ir.Node:
    """The node, of one of these types, that alone reads `value`."""
    uses = tuple(value.uses())
    need(len(uses) > 0, f"nothing reads {value.name}")
    reader = uses[0].node
    only_used_by(value, reader)
    need(
        reader.op_type in op_types and reader.domain == "",
        f"{value.name} is read by {reader.op_type}, not by {' or '.join(op_types)}",
    )
    return reader


def _other(node: ir.Node, operand: ir.Value) -> ir.Value:
    """The other operand of a node with two."""
    need(len(node.inputs) == 2, f"{node.name} does not have two operands")
    return given(node.inputs[1] if node.inputs[0] is operand else node.inputs[0])
