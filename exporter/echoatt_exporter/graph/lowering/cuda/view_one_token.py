"""Lets heads and a single new token change places by a Reshape, which moves nothing."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.branches import DECODE, PREFILL, add_condition, split_by_tokens
from echoatt_exporter.graph.copy_nodes import copy_nodes
from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import given, graph_of, need, new_node, shape_of
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.weights import add_constant
from echoatt_runtime.contract import INPUT_IDS

_MIDDLE_SWAPPED: Final = (0, 2, 1, 3)


class ViewOneToken(RewritePass):
    """Puts each Transpose of heads and tokens into an If on "one new token".

    For one token such a Transpose moves nothing, and CUDA's copies all the same: 70 copies a token
    for 22 layers with 9 followers. ONNX Runtime takes a branch for good where it knows the number
    of tokens when it loads the graph, which it is told of a session for decoding; a CUDA graph can
    then be captured, which no If can be part of.

    B batch, S new tokens, H heads, D head size. The pass acts on

    1. a Transpose of [B, S, H, D] to [B, H, S, D]: for one token it is a Reshape;
    2. the way back, from [B, H, S, D] to [B, S, H, D], likewise.

    It leaves alone Transposes of other axes, and of axes of which none is the tokens' of the call.
    """

    breaks = RewritePass.breaks | {Property.NO_BRANCHES}
    roots = frozenset({("", "Transpose")})

    def prepare(self) -> None:
        """Forget the last graph's condition."""
        self._one_token: ir.Value | None = None

    def rewrite(self, node: ir.Node) -> None:
        """Split one Transpose."""
        graph = graph_of(node)
        permutation = tuple(node.attributes.get_ints("perm", ()))
        need(permutation == _MIDDLE_SWAPPED, "the Transpose does not swap the middle two of four")
        data, result = given(node.inputs[0]), node.outputs[0]
        (tokens,) = (value for value in graph.inputs if value.name == INPUT_IDS)
        number = shape_of(tokens)[1]
        _, *middle, size = shape_of(data)
        need(number in middle, "neither axis is the tokens'")
        need(isinstance(size, int), "the size of a head is not fixed")
        # Of two axes one is the call's tokens, which the Reshape finds out
        swapped = [-1 if dim == number else dim for dim in reversed(middle)]
        need(sum(isinstance(dim, int) for dim in swapped) == 2, "the number of heads is not fixed")

        shape = add_constant(
            graph, f"{result.name}.viewed.shape", np.array([0, *swapped, size], np.int64)
        )
        view = new_node("Reshape", [data, shape], after=result, suffix="viewed")
        view.name = view.outputs[0].name = f"{DECODE}{view.name}"
        many = copy_nodes([node], {}, PREFILL)
        if self._one_token is None:
            self._one_token = add_condition(graph, by_row=True)
        split_by_tokens(result, self._one_token, [view], many, result.shape)
