"""The two branches by which a CPU's graph attends: one for a single new token, one for any number.

SplitDecode makes them, JoinDecode takes them away, and `find_attention` sees through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from echoatt_exporter.graph.matching import given, integers, made_by, need
from echoatt_runtime.contract import INPUT_IDS

# Names in a branch begin with it: a name may not be used twice, in whatever branch
DECODE: Final = "decode/"
PREFILL: Final = "prefill/"


def branches(node: ir.Node) -> tuple[ir.Graph, ir.Graph]:
    """The then-branch and the else-branch of an If."""
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def captured(node: ir.Node) -> list[set[ir.Value]]:
    """By branch of an If, the computed values and inputs of the outer graph that it reads."""
    found = []
    for branch in branches(node):
        inner = {output for one in branch for output in one.outputs}
        read = {value for one in branch for value in one.inputs if value is not None}
        found.append({value for value in read - inner if not value.is_initializer()})
    return found


def branch(nodes: Sequence[ir.Node], name: str) -> ir.Graph:
    """A branch that gives the last node's result."""
    result = nodes[-1].outputs[0]
    # Its size differs from branch to branch, as far as symbols can tell
    result.shape = None
    return ir.Graph([], [result], nodes=nodes, name=name)


def take_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Take all nodes out of a branch, still connected; it is left without outputs."""
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def drop_nodes(graph: ir.Graph) -> None:
    """Take all nodes out of a branch and let go of what they read."""
    graph.outputs.clear()
    graph.remove(list(graph), safe=True)


def one_token_condition(node: ir.Node) -> ir.Value:
    """The condition of an If that asks whether a call has one new token a row.

    Raises:
        NoMatch: It asks something else.
    """
    condition = given(node.inputs[0])
    equal = made_by(condition, "Equal")
    shape = made_by(equal.inputs[0], "Shape")
    tokens = given(shape.inputs[0])
    need(tokens.is_graph_input() and tokens.name == INPUT_IDS, "it is not about the tokens")
    bounds = [shape.attributes.get_int(name, -1) for name in ("start", "end")]
    need(bounds == [1, 2], "it is not about the number of tokens")
    need(integers(equal.inputs[1]) == [1], "it is not about one token")
    return condition
