"""How large a graph is."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.graph.same_bytes import SameBytes

_FLOAT_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSize:
    """How large a graph is.

    Attributes:
        nodes: Operators, those in subgraphs too.
        parameters: Elements of floating-point initializers. Of a quantised weight its K·N elements
            count, and its scales and zero points do not.
        bytes: What all initializers take.
    """

    nodes: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: ir.Model) -> GraphSize:
        """Measure a graph, from shapes and types alone: no weight is read."""
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        quantized: dict[ir.Value | None, int] = {}
        for node in nodes:
            if node.op_type == "MatMulNBits":
                quantized |= dict.fromkeys(node.inputs[1:4], 0)
                elements = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
                quantized[node.inputs[1]] = elements
            elif node.op_type == "GatherBlockQuantized":
                table, scales = node.inputs[0], node.inputs[2]
                quantized.setdefault(scales, 0)
                assert table is not None and table.const_value is not None  # noqa: S101, PT018
                quantized[table] = table.const_value.size * 8 // node.attributes.get_int("bits", 4)
        parameters = size = 0
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, SameBytes):
                continue
            size += tensor.nbytes
            if value in quantized:
                parameters += quantized[value]
            elif tensor.dtype in _FLOAT_TYPES:
                parameters += tensor.size
        return cls(nodes=len(nodes), parameters=parameters, bytes=size)
