"""Rotates a layer's queries and keys as one tensor."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
    given,
    graph_of,
    last_axis,
    made_by,
    need,
    new_node,
    only_reader,
    remove_dead,
    replace,
    same_dim,
    shape_of,
    static_dim,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.weights import add_constant

_HEADS_BEFORE_TOKENS: Final = (0, 2, 1, 3)


class RotateTogether(RewritePass):
    """Puts queries and keys into heads, and rotates them, as one tensor.

    For a single new token each operator costs its start more than its work, and both turn by the
    same angles.

    B batch, S new tokens, H query heads, N key heads, D head size. The pass acts on

    1. a Split of the features of a packed product, two neighbouring parts of which go, each read by
       nothing else, through a Reshape to [B, S, H, D] and [B, S, N, D], a Transpose and a
       RotaryEmbedding with the same angles and attributes. The parts become one, [B, S, (H+N)·D],
       which is rotated as H+N heads; a Split of the heads follows.

    It leaves alone queries and keys with a norm between product and rotation (qwen3, gemma3,
    olmo2), and layers without a rotation.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PACKED, Property.ROTARY_FUSED})
    roots = frozenset({("", "Split")})

    def rewrite(self, node: ir.Node) -> None:
        """Join two parts of one Split."""
        graph = graph_of(node)
        packed = given(node.inputs[0])
        need(last_axis(packed, node.attributes.get_int("axis", 0)), "it is not of the features")
        parts = [_rotated(output) for output in node.outputs]
        pairs = itertools.pairwise(parts)
        first = next((i for i, (one, other) in enumerate(pairs) if _alike(one, other)), None)
        if first is None:
            raise NoMatch("no two neighbouring parts are rotated alike")
        one, other = (part for part in parts[first : first + 2] if part is not None)

        outputs = list(node.outputs)
        sizes = [static_dim(output, -1) for output in outputs]
        sizes[first : first + 2] = [sum(sizes[first : first + 2])]
        name = f"{outputs[first].name}.rotated"
        split = ir.node(
            "Split",
            [packed, add_constant(graph, f"{name}.sizes", np.array(sizes, np.int64))],
            {"axis": -1},
            num_outputs=len(sizes),
            name=f"{name}.split",
        )
        for output, size in zip(split.outputs, sizes, strict=True):
            output.type = packed.type
            output.shape = ir.Shape([*list(shape_of(packed))[:-1], size])
        joined = split.outputs[first]
        joined.name = f"{name}.part"
        graph.insert_before(node, split)

        rotary = min(one.rotary, other.rotary, key=list(graph).index)
        nodes = _rotation(graph, joined, one, other, name)
        graph.insert_before(rotary, nodes)
        for part, heads in zip((one, other), nodes[-1].outputs, strict=True):
            result = part.rotary.outputs[0]
            heads.name = f"{result.name}.together"
            replace(result, heads)
        kept = [output for i, output in enumerate(outputs) if i not in (first, first + 1)]
        for old, new in zip(kept, (o for o in split.outputs if o is not joined), strict=True):
            new.name = f"{old.name}.apart"
            replace(old, new)
        remove_dead(graph, [one.rotary.outputs[0], other.rotary.outputs[0], *outputs])


@dataclass(frozen=True, slots=True)
class _Rotated:
    """A part of a packed product that is put into heads and rotated.

    Attributes:
        heads: Their number.
        size: Of one.
        rotary: The RotaryEmbedding.
    """

    heads: int
    size: int
    rotary: ir.Node


def _rotated(part: ir.Value) -> _Rotated | None:
    """See a part of a Split as rotated heads; None if it is not."""
    try:
        reshape = _reader(part, "Reshape")
        transpose = _reader(reshape.outputs[0], "Transpose")
        permutation = tuple(transpose.attributes.get_ints("perm", ()))
        need(permutation == _HEADS_BEFORE_TOKENS, "the heads do not come before the tokens")
        rotary = _reader(transpose.outputs[0], "RotaryEmbedding")
        in_heads = reshape.outputs[0]
        need(
            all(same_dim(part, axis, in_heads, axis) for axis in (0, 1)),
            "the Reshape moves rows or tokens",
        )
        heads, size = (static_dim(in_heads, axis) for axis in (2, 3))
        need(heads * size == static_dim(part, -1), "it is reshaped to more than heads")
    except NoMatch:
        return None
    return _Rotated(heads, size, rotary)


def _reader(value: ir.Value, op_type: str) -> ir.Node:
    node = only_reader(value)
    need(node.inputs[0] is value, f"{value.name} is not what {op_type} works on")
    return made_by(node.outputs[0], op_type)


def _alike(one: _Rotated | None, other: _Rotated | None) -> bool:
    """Whether two parts can be rotated as one tensor."""
    if one is None or other is None:
        return False
    attributes, others = (
        {name: attribute.value for name, attribute in part.rotary.attributes.items()}
        for part in (one, other)
    )
    angles, other_angles = one.rotary.inputs[1:], other.rotary.inputs[1:]
    return (
        one.size == other.size
        # With this attribute the operator takes three dimensions, not four
        and "num_heads" not in attributes
        and attributes == others
        and len(angles) == len(other_angles)
        and all(a is b for a, b in zip(angles, other_angles, strict=True))
    )


def _rotation(
    graph: ir.Graph, joined: ir.Value, one: _Rotated, other: _Rotated, name: str
) -> list[ir.Node]:
    """What rotates [B, S, (H+N)·D] and gives [B, H, S, D] and [B, N, S, D]."""
    batch, tokens, _ = shape_of(joined)
    heads, size = one.heads + other.heads, one.size
    shape = add_constant(graph, f"{name}.shape", np.array([0, 0, heads, size], np.int64))
    numbers = add_constant(graph, f"{name}.heads", np.array([one.heads, other.heads], np.int64))
    split_heads = new_node("Reshape", [joined, shape], after=joined, suffix="in_heads")
    turned = new_node(
        "Transpose",
        [split_heads.outputs[0]],
        {"perm": _HEADS_BEFORE_TOKENS},
        after=joined,
        suffix="turned",
    )
    rotary = new_node(
        "RotaryEmbedding",
        [turned.outputs[0], *one.rotary.inputs[1:]],
        dict(one.rotary.attributes),
        after=joined,
        suffix="rotary",
    )
    split_heads.outputs[0].shape = ir.Shape([batch, tokens, heads, size])
    turned.outputs[0].shape = rotary.outputs[0].shape = ir.Shape([batch, heads, tokens, size])
    apart = ir.node(
        "Split", [rotary.outputs[0], numbers], {"axis": 1}, num_outputs=2, name=f"{name}.apart"
    )
    return [split_heads, turned, rotary, apart]
