"""The two branches of what a single new token is better off with: one for it, one for any number.

Lowerings make them, JoinDecode takes them away, and `find_attention` sees through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    integers,
    made_by,
    need,
    new_node,
    remove_dead,
    replace,
    shape_of,
)
from echoatt_exporter.graph.weights import add_constant
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
    wanted = [1, 2]
    if not tokens.is_graph_input():
        row = made_by(tokens, "Gather")
        need(integers(row.inputs[1]) == [0], "it is not about the first row")
        tokens, wanted = given(row.inputs[0]), [-1, -1]
    need(tokens.is_graph_input() and tokens.name == INPUT_IDS, "it is not about the tokens")
    bounds = [shape.attributes.get_int(name, -1) for name in ("start", "end")]
    need(bounds == wanted, "it is not about the number of tokens")
    need(integers(equal.inputs[1]) == [1], "it is not about one token")
    return condition


def add_condition(graph: ir.Graph, *, by_row: bool = False) -> ir.Value:
    """Let a graph compute whether a call has one new token a row.

    Args:
        graph: The graph.
        by_row: Ask the first row alone how long it is. ONNX Runtime computes a shape once and for
            all where it knows all of it, and in a session for one token the batch is open still.
    """
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    nodes: list[ir.Node] = []
    bounds = {"start": 1, "end": 2}
    if by_row:
        first = add_constant(graph, "seq.first", np.array(0, np.int64))
        nodes.append(ir.node("Gather", [tokens, first], {"axis": 0}, name="seq.row"))
        tokens, bounds = _typed(nodes[-1], ir.DataType.INT64, [shape_of(tokens)[1]]), {}
    nodes.append(ir.node("Shape", [tokens], bounds, name="seq.number"))
    number = _typed(nodes[-1], ir.DataType.INT64, [1])
    one = add_constant(graph, "seq.one", np.array([1], np.int64))
    nodes.append(ir.node("Equal", [number, one], name="seq.is_one"))
    condition = _typed(nodes[-1], ir.DataType.BOOL, [1])
    graph.insert_before(next(iter(graph)), nodes)
    return condition


def _typed(node: ir.Node, dtype: ir.DataType, dims: Sequence[int | ir.SymbolicDim]) -> ir.Value:
    """A node's result, named after it."""
    result = node.outputs[0]
    result.name, result.type, result.shape = node.name, ir.TensorType(dtype), ir.Shape(dims)
    return result


def split_by_tokens(
    result: ir.Value,
    condition: ir.Value,
    one: Sequence[ir.Node],
    many: Sequence[ir.Node],
    shape: ir.Shape | None,
) -> None:
    """Put an If in the place of what computes a value.

    Args:
        result: The value; what computes it for it alone goes.
        condition: Of `add_condition`.
        one: What computes it for one token, a copy.
        many: What computes it for any number, a copy.
        shape: Of what the If gives, as far as both agree.
    """
    last = result.producer()
    assert last is not None  # noqa: S101 - a rule has found it
    graph = graph_of(last)
    split = new_node(
        "If",
        [condition],
        {
            "then_branch": ir.AttrGraph("then_branch", branch(one, f"{DECODE}{result.name}")),
            "else_branch": ir.AttrGraph("else_branch", branch(many, f"{PREFILL}{result.name}")),
        },
        after=result,
        suffix="split",
    )
    split.outputs[0].shape = shape
    graph.insert_before(last, split)
    replace(result, split.outputs[0])
    remove_dead(graph, [result])
