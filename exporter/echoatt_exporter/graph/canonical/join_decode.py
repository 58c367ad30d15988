"""Takes SplitDecode's branches away again."""

from __future__ import annotations

import onnx_ir as ir

from echoatt_exporter.graph.branches import (
    PREFILL,
    branches,
    drop_nodes,
    one_token_condition,
    take_nodes,
)
from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    remove_dead,
    replace,
)
from echoatt_exporter.graph.properties import Property


class JoinDecode(RewritePass):
    """Puts the branch for any number of tokens in the place of an If on "one new token".

    For a bundle that is rewritten: the passes that apply a plan walk a graph without branches, and
    SplitDecode splits what is left at the end. The pass acts on each If whose condition says that
    `input_ids` has one token a row, and

    1. moves its else-branch, which is right for one token too, into the graph;
    2. removes the Reshape by which SplitDecode had the transposed values written out.

    Every other If stays.
    """

    gives = frozenset({Property.NO_BRANCHES})
    roots = frozenset({("", "If")})

    def rewrite(self, node: ir.Node) -> None:
        """Join one If."""
        graph = graph_of(node)
        condition = one_token_condition(node)
        one, many = branches(node)
        drop_nodes(one)
        result = many.outputs[0]
        nodes = take_nodes(many)
        graph.insert_before(node, nodes)
        replace(node.outputs[0], result)
        graph.remove(node, safe=True)
        remove_dead(graph, [condition])
        for moved in nodes:
            for value in moved.outputs:
                value.name = str(value.name).removeprefix(PREFILL)
            moved.name = str(moved.name).removeprefix(PREFILL)
            if moved.op_type == "MatMul":
                _read_transposed(graph, moved)


def _read_transposed(graph: ir.Graph, product: ir.Node) -> None:
    """Let a product read the Transpose in front of a Reshape."""
    copied = given(product.inputs[1]).producer()
    transposed = None if copied is None else copied.inputs[0]
    if copied is not None and copied.op_type == "Reshape" and transposed is not None:
        product.replace_input_with(1, transposed)
        remove_dead(graph, [copied.outputs[0]])
