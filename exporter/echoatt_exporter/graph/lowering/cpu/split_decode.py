"""Lets a single new token attend by products that a CPU need not copy the caches for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.branches import DECODE, PREFILL, add_condition, split_by_tokens
from echoatt_exporter.graph.copy_nodes import copy_nodes
from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    NoMatch,
    given,
    graph_of,
    made_by,
    need,
    new_node,
    only_reader,
    only_used_by,
    scalar,
    shape_of,
    static_dim,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.weights import add_constant

_DOMAIN = "com.microsoft"
_OPSET = 1
_LAST_TWO_SWAPPED = (0, 1, 3, 2)
_BY_ELEMENT = frozenset({"Add", "Div", "Mul", "Tanh"})


class SplitDecode(RewritePass):
    """Puts each product with a cache into an If on "one new token".

    ONNX Runtime's CPU product packs its right operand, which for a cache means a copy at every
    token. With the cache on the left nothing is copied: a layer's scores took 343 us instead of 491
    at 4,112 tokens, its context 373 instead of 490. For many tokens the packing is worth its while,
    and the else-branch has the nodes as they were. Both branches give as many elements.

    B batch, N key/value heads, G query heads of each, S new tokens, T capacity, D head size. In a
    float32 graph the pass acts

    1. on the product of queries [B, N, G·S, D] and transposed key cache [B, N, T, D], with all that
       follows up to the probabilities: operators by element, whose other operand is a scalar or has
       one head, reshapes, and one Softmax over the last axis. For one token the product is
       FusedMatMul(keys, queries) and a Transpose of its small result; the reshapes, which split
       groups and tokens, are left out, and a scaling that comes first is folded in. The Reshape
       behind the Softmax, which joins them again, stays where it is: as a branch's last node it
       would copy its input, which for many tokens is the largest tensor there is;
    2. on the product of probabilities [B, N, G·S, T] and transposed value cache [B, N, D, T], which
       becomes FusedMatMul(values, probabilities) and a Transpose. For many tokens the transposed
       values are written out (the Reshape, which changes nothing, keeps ONNX Runtime from undoing
       it), because the product packs them faster so.

    Everything else stays: products whose transposed cache something else reads too, scores that
    something else reads on the way, other element types.
    """

    breaks = RewritePass.breaks | {Property.NO_BRANCHES}
    roots = frozenset({("", "MatMul")})

    def prepare(self) -> None:
        """Forget the last graph's condition."""
        self._one_token: ir.Value | None = None

    def rewrite(self, node: ir.Node) -> None:
        """Split one product."""
        view = made_by(node.inputs[1], "Transpose")
        need(
            tuple(view.attributes.get_ints("perm", ())) == _LAST_TWO_SWAPPED,
            "the Transpose does not swap the last two of four axes",
        )
        only_used_by(view.outputs[0], node)
        cache = given(view.inputs[0])
        scatter = made_by(cache, "TensorScatter")
        need(cache.dtype == ir.DataType.FLOAT, "FusedMatMul has a CPU kernel for float32 only")
        if scatter.attributes.get_int("axis", -2) in (-1, 3):
            self._split_context(node, view, cache)
        else:
            self._split_scores(node, view, cache)

    def _split_context(self, node: ir.Node, view: ir.Node, values_BNDT: ir.Value) -> None:
        graph, result = graph_of(node), node.outputs[0]
        shape = add_constant(
            graph,
            f"{result.name}.transposed.shape",
            np.array([0, 0, -1, static_dim(values_BNDT, 2)], np.int64),
        )
        transposed = view.outputs[0]
        many = copy_nodes([view], {}, PREFILL)
        many.append(
            new_node("Reshape", [many[0].outputs[0], shape], after=transposed, suffix="written_out")
        )
        many += copy_nodes([node], {transposed: many[-1].outputs[0]}, PREFILL)
        one = _left_product(values_BNDT, given(node.inputs[0]), result, {})
        self._branch(result, one, many, result.shape)

    def _split_scores(self, node: ir.Node, view: ir.Node, keys_BNTD: ir.Value) -> None:
        chain = _up_to_probabilities(node)
        result = chain[-1].outputs[0]
        scores = node.outputs[0]
        by_element = [item for item in chain if item.op_type != "Reshape"]
        attributes: dict[str, float] = {}
        if (alpha := _scaling(by_element[0], scores)) is not None:
            attributes["alpha"] = alpha
            scores = by_element.pop(0).outputs[0]
        one = _left_product(keys_BNTD, given(node.inputs[0]), scores, attributes)
        # Without the reshapes, each reads what the one before it gives
        substitutes: dict[ir.Value, ir.Value | None] = {}
        for item in by_element:
            before = next(v for v in item.inputs if v is not None and _is_between(v, node, chain))
            substitutes[before] = one[-1].outputs[0]
            one += copy_nodes([item], substitutes, DECODE)
            one[-1].outputs[0].shape = None
        many = copy_nodes([view, node, *chain], {}, PREFILL)
        # For one token it is [B, N, G, T], for many [B, H, S, T]
        batch, _, _, capacity = shape_of(result)
        self._branch(result, one, many, ir.Shape([batch, None, None, capacity]))

    def _branch(
        self,
        result: ir.Value,
        one: Sequence[ir.Node],
        many: Sequence[ir.Node],
        shape: ir.Shape | None,
    ) -> None:
        last = result.producer()
        assert last is not None  # noqa: S101 - the rule has found it
        graph = graph_of(last)
        if self._one_token is None:
            self._one_token = add_condition(graph)
        split_by_tokens(result, self._one_token, one, many, shape)
        graph.opset_imports.setdefault(_DOMAIN, _OPSET)


def _left_product(
    cache: ir.Value, other: ir.Value, result: ir.Value, attributes: dict[str, float]
) -> list[ir.Node]:
    """What computes `result`, other · cache, with the cache on the left."""
    product = new_node(
        "FusedMatMul",
        [cache, other],
        {"transB": 1, **attributes},
        after=result,
        suffix="one_token",
        domain=_DOMAIN,
    )
    turned = new_node(
        "Transpose",
        [product.outputs[0]],
        {"perm": _LAST_TWO_SWAPPED},
        after=result,
        suffix="one_token.turned",
    )
    product.outputs[0].shape = turned.outputs[0].shape = None
    return [product, turned]


def _up_to_probabilities(product: ir.Node) -> list[ir.Node]:
    """The nodes behind a product of queries and keys, to the Softmax that a Reshape reads."""
    chain: list[ir.Node] = []
    value = product.outputs[0]
    while not chain or chain[-1].op_type != "Softmax":
        node = only_reader(value)
        need(
            node.op_type in _BY_ELEMENT | {"Reshape", "Softmax"} and node.domain == "",
            f"{node.op_type} stands between scores and probabilities",
        )
        if node.op_type in _BY_ELEMENT:
            for other in node.inputs:
                need(other is value or _is_same_for_heads(given(other)), "heads are told apart")
        chain.append(node)
        value = node.outputs[0]
    softmax = chain[-1]
    need(len(shape_of(value)) == 4, "the Softmax is not of four dimensions")
    need(softmax.attributes.get_int("axis", -1) in (-1, 3), "the Softmax is not of the last axis")
    last = only_reader(value)
    need(last.op_type == "Reshape", "no Reshape joins groups and tokens behind the Softmax")
    return chain


def _is_same_for_heads(value: ir.Value) -> bool:
    """Whether an operand is a scalar, or a mask [batch, 1, seq, capacity]."""
    shape = shape_of(value)
    return all(dim == 1 for dim in shape) or (len(shape) == 4 and shape[1] == 1)


def _is_between(value: ir.Value, product: ir.Node, chain: Sequence[ir.Node]) -> bool:
    return value.producer() is product or value.producer() in chain


def _scaling(node: ir.Node, scores: ir.Value) -> float | None:
    """What a Mul right behind the product multiplies the scores by, if it is a constant."""
    if node.op_type != "Mul" or scores not in node.inputs:
        return None
    try:
        return scalar(node.inputs[1] if node.inputs[0] is scores else node.inputs[0])
    except NoMatch:
        return None
