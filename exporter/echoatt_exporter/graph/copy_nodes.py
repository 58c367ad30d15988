"""Copies of a graph's nodes that read other values than the originals do."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def copy_nodes(
    body: Sequence[ir.Node], substitutes: dict[ir.Value, ir.Value | None], prefix: str
) -> list[ir.Node]:
    """Copy of `body` that read the substitutes; adds their outputs to the substitutes.

    Args:
        body: Nodes, in graph order.
        substitutes: By value, what the copies read in its place; other values stay.
        prefix: What the names of nodes and outputs begin with.
    """
    copies = []
    for node in body:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else substitutes.get(v, v) for v in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            # Nodes of foreign graphs may have no name, and two may not have the same
            name=f"{prefix}{node.name or node.outputs[0].name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"{prefix}{old.name}", old.type, old.shape
            substitutes[old] = new
        copies.append(copy)
    return copies
