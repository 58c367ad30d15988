"""Quantises the table in which tokens are looked up, and the LM head with it if they are one.

V vocabulary, E hidden size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.lowering.quantized_weight import (
    DOMAIN,
    OPSET,
    QUANTISABLE,
    add_quantized,
    multiply_quantized,
)
from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    need,
    new_node,
    remove_dead,
    replace,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import Kind, role_of, set_role, unite_roles
from echoatt_exporter.graph.same_bytes import add_same_bytes
from echoatt_exporter.graph.weights import weight_of
from echoatt_runtime.contract import Quantisation


class QuantizeTable(RewritePass):
    """Replaces the look-up of embeddings by `GatherBlockQuantized` (com.microsoft).

    The pass acts on a Gather of rows of a [V, E] float32 or float16 initializer whose role is
    embedding,

    1. that equals, element for element, the transpose of the [E, V] weight of a MatMul, where E is
       a whole number of blocks: the LM head becomes `MatMulNBits`, and both read the same bytes;
    2. any other: the table is quantised on its own.

    It leaves alone tables of positions, tables that something else reads too, and rows that are not
    a whole number of blocks, which the operator would give with their padding.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PACKED, Property.ROLES_ASSIGNED})
    roots = frozenset({("", "Gather")})

    def __init__(self, quantisation: Quantisation, accuracy_level: int = 4) -> None:
        """Take to how many bits; `accuracy_level` is the head's, as in `QuantizeWeights`."""
        self._quantisation = quantisation
        self._accuracy_level = accuracy_level

    def rewrite(self, node: ir.Node) -> None:
        """Quantise one table."""
        graph = graph_of(node)
        table = given(node.inputs[0])
        tensor = weight_of(table, rank=2)
        need(tensor.dtype in QUANTISABLE, f"{table.name} is {tensor.dtype}")
        need(node.attributes.get_int("axis", 0) == 0, "not rows are looked up")
        need(len(table.uses()) == 1, f"{table.name} is used elsewhere too")
        features = int(tensor.shape.numpy()[1])
        size = self._quantisation.block_size
        need(features % size == 0, f"rows of {features} are not whole blocks of {size}")
        role = role_of(table)
        kinds = {use.kind for part in role for use in part.uses}
        need(Kind.EMBEDDING in kinds, f"{table.name} holds no embeddings")

        head = _head(graph, tensor)
        chosen, name = self._quantisation, str(table.name)
        if head is None:
            bits = chosen.embedding_bits
            added = add_quantized(graph, name, _transposed(tensor), bits, size, role, in_rows=True)
            rows = added.packed
        else:
            bits = chosen.head_bits
            role = unite_roles(role, role_of(given(head.inputs[1])))
            added = add_quantized(graph, name, _transposed(tensor), bits, size, role)
            rows = add_same_bytes(graph, added.packed, features * bits // 8)
            set_role(rows, role)
            multiply_quantized(head, added, bits, size, self._accuracy_level)
        old = node.outputs[0]
        lookup = new_node(
            "GatherBlockQuantized",
            [rows, node.inputs[1], added.scales],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": bits},
            after=old,
            suffix=f"int{bits}",
            domain=DOMAIN,
        )
        graph.insert_before(node, lookup)
        replace(old, lookup.outputs[0])
        remove_dead(graph, [old])
        graph.opset_imports.setdefault(DOMAIN, OPSET)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A table [V, E] as the weight [E, V] of a product, when it is read."""
    shape = ir.Shape(tensor.shape.numpy()[::-1])

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _head(graph: ir.Graph, table: ir.TensorProtocol) -> ir.Node | None:
    """The product whose weight alone is a transposed copy of the table."""
    shape = table.shape.numpy()[::-1]
    for node in graph:
        if node.domain != "" or node.op_type != "MatMul":
            continue
        weight = node.inputs[1]
        tensor = None if weight is None or not weight.is_initializer() else weight.const_value
        if tensor is None or len(given(weight).uses()) != 1 or tensor.dtype != table.dtype:
            continue
        if tuple(tensor.shape.numpy()) == shape and np.array_equal(table.numpy(), tensor.numpy().T):
            return node
    return None
