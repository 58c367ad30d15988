"""Quantised weights in a graph, made when they are written, and the products that read them.

K inputs, N outputs, J blocks of inputs.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import graph_of, new_node, remove_dead, replace
from echoatt_exporter.graph.roles import Role, set_role
from echoatt_exporter.graph.weights import add_lazy, weight_of
from echoatt_exporter.quantise.block_quantizer import packed_shape, quantize_blocks
from echoatt_runtime.contract import Bits

DOMAIN: Final = "com.microsoft"
OPSET: Final = 1
# What the kernels give: the CPU has none for bfloat16
QUANTISABLE: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class QuantizedWeight(NamedTuple):
    """A weight's initializers.

    Attributes:
        packed: Uint8 [N, J, bytes of a block].
        scales: [N, J], in the weight's element type.
    """

    packed: ir.Value
    scales: ir.Value


def add_quantized(
    graph: ir.Graph,
    name: str,
    tensor_KN: ir.TensorProtocol,
    bits: Bits,
    block_size: int,
    role: Role,
    *,
    in_rows: bool = False,
) -> QuantizedWeight:
    """Add a weight's packed bits and scales as initializers; nothing is computed yet.

    Args:
        graph: Where to.
        name: What their names begin with.
        tensor_KN: The weight.
        bits: A level's.
        block_size: Inputs that share a scale.
        role: Of its columns.
        in_rows: Give the packed bits of all an output's blocks in one row, [N, J · bytes].
    """
    rows, columns = (int(size) for size in tensor_KN.shape.numpy())
    shape = packed_shape(rows, columns, bits, block_size)
    source = _OnDemand(tensor_KN, bits, block_size)
    dims = (shape[0], shape[1] * shape[2]) if in_rows else shape

    def packed() -> np.ndarray:
        return source.take(0).reshape(dims)

    def scales() -> np.ndarray:
        return source.take(1)

    added = QuantizedWeight(
        add_lazy(graph, f"{name}.q", packed, ir.DataType.UINT8, dims),
        add_lazy(graph, f"{name}.scales", scales, tensor_KN.dtype, shape[:2]),
    )
    for value in added:
        set_role(value, role)
    return added


def multiply_quantized(
    node: ir.Node, weight: QuantizedWeight, bits: Bits, block_size: int, accuracy_level: int
) -> None:
    """Replace a MatMul by `MatMulNBits` with its weight's quantised form."""
    graph = graph_of(node)
    rows, columns = (int(size) for size in weight_of(node.inputs[1]).shape.numpy())
    old = node.outputs[0]
    product = new_node(
        "MatMulNBits",
        [node.inputs[0], *weight],
        {
            "K": rows,
            "N": columns,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        after=old,
        suffix=f"int{bits}",
        domain=DOMAIN,
    )
    graph.insert_before(node, product)
    replace(old, product.outputs[0])
    remove_dead(graph, [old])
    graph.opset_imports.setdefault(DOMAIN, OPSET)


class _OnDemand:
    """A weight that is quantised when the first of its parts is asked for.

    The other part is kept until it was asked for too, so that writing a model quantises each
    weight once and keeps none.
    """

    def __init__(self, tensor: ir.TensorProtocol, bits: Bits, block_size: int) -> None:
        self._tensor = tensor
        self._bits = bits
        self._block_size = block_size
        self._waiting: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, index: int) -> np.ndarray:
        """Part 0 packed bits [N, J, bytes of a block], 1 scales [N, J]."""
        with self._lock:
            if index not in self._waiting:
                self._waiting = dict(enumerate(self._quantize()))
            return self._waiting.pop(index)

    def _quantize(self) -> tuple[np.ndarray, np.ndarray]:
        weight_KN = self._tensor.numpy()
        packed, scales = quantize_blocks(weight_KN, self._bits, self._block_size)
        return packed, scales.astype(weight_KN.dtype)
