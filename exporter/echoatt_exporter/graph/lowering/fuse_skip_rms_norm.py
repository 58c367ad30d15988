"""Joins a residual addition and the RMSNorm that follows it."""

from __future__ import annotations

import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    made_by,
    need,
    new_node,
    remove_dead,
    replace,
    same_shape,
    shape_of,
)
from echoatt_exporter.graph.properties import Property

_DOMAIN = "com.microsoft"
_OPSET = 1


class FuseSkipRmsNorm(RewritePass):
    """Replaces Add and `RMSNormalization` by one `SkipSimplifiedLayerNormalization`.

    The fused operator gives the sum as its fourth output, which the next
    residual connection reads. The pass acts where a norm over the last axis of a [batch, seq,
    hidden] value reads an Add of two values of the same shape and type,

    1. whose sum only the norm reads: the fourth output is left out;
    2. whose sum others read too, or is a graph output: they read the fourth output.

    Of two norms of the same sum the first is fused and the other reads the fourth output. The pass
    refuses an Add that broadcasts (a bias, a scalar), because the operator does not.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.NORMS_FUSED})
    gives = frozenset({Property.RESIDUALS_FUSED})
    roots = frozenset({("", "RMSNormalization")})

    def rewrite(self, node: ir.Node) -> None:
        """Fuse one norm with the addition in front of it."""
        graph = graph_of(node)
        total = given(node.inputs[0])
        add = made_by(total, "Add")
        left, right = given(add.inputs[0]), given(add.inputs[1])
        weight = given(node.inputs[1])
        need(weight.is_initializer(), "the norm's weight is not an initializer")
        need(node.attributes.get_int("axis", -1) == -1, "the norm is not over the last axis")
        need(len(shape_of(total)) == 3, "the sum does not have three dimensions")
        need(same_shape(left, right), "the addition broadcasts, or its shapes are not known")
        need(left.dtype == right.dtype == weight.dtype, "element types differ")

        fused = new_node(
            "SkipSimplifiedLayerNormalization",
            [left, right, weight],
            {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
            after=node.outputs[0],
            suffix="skip",
            domain=_DOMAIN,
        )
        # Where the addition stood, not the norm: other readers of the sum may come before the norm.
        graph.insert_after(add, fused)
        replace(node.outputs[0], fused.outputs[0])
        if total.is_graph_output() or len(total.uses()) > 1:
            fused.resize_outputs(4)
            fused.outputs[1].name = fused.outputs[2].name = ""
            fused.outputs[3].name = f"{total.name}.skip"
            graph.remove(node, safe=True)
            replace(total, fused.outputs[3])
            remove_dead(graph, [total])
        else:
            remove_dead(graph, [node.outputs[0]])
        graph.opset_imports.setdefault(_DOMAIN, _OPSET)
