"""Recognises rotary position embedding in the elementary operators that PyTorch's exporter leaves.

B batch, S new tokens, H heads, D head size, R rotated part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
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
    same_dim,
    scalar,
    shape_of,
    slice_bounds,
    split_operands,
    static_dim,
)
from echoatt_exporter.graph.properties import Property


class FuseRotary(RewritePass):
    """Replaces x * cos + rotate_half(x) * sin by one `RotaryEmbedding` (ai.onnx 23).

    The fused operator takes the angles of R/2 pairs, [B, S, R/2], so each row has its own
    positions; ONNX Runtime has kernels for it on CPU (float32, float16) and CUDA (also bfloat16).
    The elementary form has every angle twice, [B, S, R]. The pass acts on

    1. a rotation of the whole head;
    2. a rotation of the first R elements of a head, with the rest passed through and concatenated
       behind (gpt_neox, phi3): the concatenation goes as well;
    3. a rotation in float32 between Casts from and to a half type (olmo2): fused between the Casts.

    The angles must be provably the same in both halves: cosine and sine come from a Concat of one
    value with itself, through Cast, Cos, Sin and multiplication by a constant (attention scaling),
    which are then done once on half the size. The pass refuses anything else, and angles that are
    not one row for each row of x.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.COMPUTED_ONCE})
    gives = frozenset({Property.ROTARY_FUSED})
    roots = frozenset({("", "Add")})

    def __init__(self) -> None:
        self._halves: dict[ir.Value, ir.Value] = {}

    def prepare(self) -> None:
        """Forget the angles of an earlier model."""
        self._halves = {}

    def rewrite(self, node: ir.Node) -> None:
        """Fuse the rotation whose last step is this Add."""
        graph = graph_of(node)
        rotation = _match_rotation(node)
        x = rotation.x
        angles = [_angles(value, x) for value in (rotation.cos, rotation.sin)]
        chains = [_duplicated(value) for value in angles]
        partial = _match_partial(node, x)

        size = static_dim(x, -1)
        attributes = {} if partial is None else {"rotary_embedding_dim": size}
        data = x if partial is None else partial.head
        old = node.outputs[0] if partial is None else partial.joined.outputs[0]
        last = old.producer()
        assert last is not None  # noqa: S101 - Add or Concat
        halves = [
            self._half(graph, value, chain) for value, chain in zip(angles, chains, strict=True)
        ]
        fused = new_node("RotaryEmbedding", [data, *halves], attributes, after=old, suffix="rotary")
        graph.insert_before(last, fused)
        replace(old, fused.outputs[0])
        remove_dead(graph, [old])

    def _half(self, graph: ir.Graph, value: ir.Value, chain: list[ir.Node]) -> ir.Value:
        """The first half of duplicated angles: the same operators, without the duplication."""
        if value in self._halves:
            return self._halves[value]
        concat, *steps = chain
        result = given(concat.inputs[0])
        for step in steps:
            old = step.outputs[0]
            if old not in self._halves:
                inputs = [result if _is_angle(item) else item for item in step.inputs]
                copy = new_node(
                    step.op_type, inputs, dict(step.attributes), after=old, suffix="half"
                )
                *outer, size = shape_of(old)
                assert isinstance(size, int)  # noqa: S101 - checked by _angles
                copy.outputs[0].shape = ir.Shape([*outer, size // 2])
                graph.insert_after(step, copy)
                self._halves[old] = copy.outputs[0]
            result = self._halves[old]
        self._halves[value] = result
        return result


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A matched rotation: what is rotated, and the operands it is multiplied by."""

    x: ir.Value  # [B, H, S, R]
    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True, slots=True)
class _Partial:
    """A matched partial rotation: the whole head, and the Concat behind the rotation."""

    head: ir.Value  # [B, H, S, D]
    joined: ir.Node


def _match_rotation(add: ir.Node) -> _Rotation:
    """Match x * cos + rotate_half(x) * sin in every operand order."""
    reasons: list[str] = []
    for straight_product, other in split_operands(add, "Mul"):
        try:
            turned_product = made_by(other, "Mul")
            for index in (0, 1):
                turned = given(turned_product.inputs[index])
                try:
                    x, cast = _match_rotate_half(turned)
                except NoMatch as reason:
                    reasons.append(str(reason))
                    continue
                sin = given(turned_product.inputs[1 - index])
                x, cos = _match_straight(straight_product, x, cast)
                only_used_by(straight_product.outputs[0], add)
                only_used_by(turned_product.outputs[0], add)
                only_used_by(turned, turned_product)
                need(len(shape_of(x)) == 4, "what is rotated does not have four dimensions")
                return _Rotation(x, cos, sin)
        except NoMatch as reason:
            reasons.append(str(reason))
    raise NoMatch(" / ".join(dict.fromkeys(reasons)) or "it does not add two products")


def _match_rotate_half(value: ir.Value) -> tuple[ir.Value, ir.DataType | None]:
    """Match Concat(-x[h:], x[:h]), in a Cast or not: x, and the type that it is cast to."""
    producer = value.producer()
    cast = None
    if producer is not None and producer.op_type == "Cast":
        cast, value = value.dtype, given(producer.inputs[0])
    concat = made_by(value, "Concat")
    need(len(concat.inputs) == 2, "a Concat does not join two halves")
    need(last_axis(value, concat.attributes.get_int("axis", 0)), "a Concat is not of the last axis")
    upper = made_by(made_by(concat.inputs[0], "Neg").inputs[0], "Slice")
    lower = made_by(concat.inputs[1], "Slice")
    x = given(lower.inputs[0])
    need(upper.inputs[0] is x, "the two halves are not of the same value")
    size = static_dim(x, -1)
    need(size % 2 == 0, "the rotated size is odd")
    need(slice_bounds(lower) == (0, size // 2), "the lower half is not the first half")
    need(slice_bounds(upper) == (size // 2, size), "the upper half is not the second half")
    return x, cast


def _match_straight(
    product: ir.Node, x: ir.Value, cast: ir.DataType | None
) -> tuple[ir.Value, ir.Value]:
    """Match x * cos: what is rotated, cast like its rotated half, and the cosine."""
    for index in (0, 1):
        operand, cos = given(product.inputs[index]), given(product.inputs[1 - index])
        if cast is None and operand is x:
            return x, cos
        producer = operand.producer()
        if (
            cast is not None
            and producer is not None
            and producer.op_type == "Cast"
            and producer.inputs[0] is x
            and operand.dtype == cast
        ):
            return operand, cos
    raise NoMatch("the cosine multiplies something else than what is rotated")


def _match_partial(add: ir.Node, x: ir.Value) -> _Partial | None:
    """Match Concat(rotated x[:R], x[R:]) behind the rotation; None if all of x is rotated."""
    first = x.producer()
    uses = tuple(add.outputs[0].uses())
    if first is None or first.op_type != "Slice" or len(uses) != 1:
        return None
    joined = uses[0].node
    if joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    rest = given(joined.inputs[1]).producer()
    head = given(first.inputs[0])
    if rest is None or rest.op_type != "Slice" or rest.inputs[0] is not head:
        return None
    try:
        size = static_dim(x, -1)
        whole = (0, size), (size, static_dim(head, -1))
        fits = (slice_bounds(first), slice_bounds(rest)) == whole
    except NoMatch:
        return None
    axis = joined.attributes.get_int("axis", 0)
    if not fits or not last_axis(joined.outputs[0], axis) or add.outputs[0].is_graph_output():
        return None
    return _Partial(head, joined)


def _angles(operand: ir.Value, x_BHSR: ir.Value) -> ir.Value:
    """The [B, S, R] value behind a cosine or sine that was given an axis for the heads."""
    unsqueeze = made_by(operand, "Unsqueeze")
    need(integers(unsqueeze.inputs[1]) == [1], "the angles' new axis is not that of the heads")
    angles = given(unsqueeze.inputs[0])
    need(len(shape_of(angles)) == 3, "the angles do not have three dimensions")
    need(same_dim(angles, 0, x_BHSR, 0), "the angles' batch is not that of x")
    need(same_dim(angles, 1, x_BHSR, 2), "the angles' length is not that of x")
    need(static_dim(angles, -1) == static_dim(x_BHSR, -1), "the angles' size is not that of x")
    need(angles.dtype == x_BHSR.dtype, "the angles' element type is not that of x")
    return angles


def _duplicated(value: ir.Value) -> list[ir.Node]:
    """The nodes from the Concat that duplicates the angles up to `value`, in that order."""
    steps: list[ir.Node] = []
    while True:
        node = value.producer()
        need(node is not None, f"{value.name} is not computed")
        assert node is not None  # noqa: S101 - said above
        if node.op_type == "Concat" and node.domain == "":
            need(
                len(node.inputs) == 2 and node.inputs[0] is node.inputs[1],
                "the angles are not a value joined with itself",
            )
            need(last_axis(value, node.attributes.get_int("axis", 0)), "the angles' halves differ")
            return [node, *reversed(steps)]
        need(
            node.op_type in ("Cast", "Cos", "Sin", "Mul") and node.domain == "",
            f"the angles go through {node.op_type}",
        )
        operands = [item for item in node.inputs if item is not None and _is_angle(item)]
        need(len(operands) == 1, f"{node.name} does not have one operand that varies")
        for item in node.inputs:
            if item is not operands[0]:
                scalar(item)
        steps.append(node)
        value = operands[0]


def _is_angle(value: ir.Value | None) -> bool:
    """Whether a step's operand is the one that varies, and not the constant beside it."""
    if value is None:
        return False
    node = value.producer()
    return node is not None and node.op_type != "Constant"
