"""Quantises constant weights of matrix products to 4 or 8 bits.

K rows (inputs), N columns (outputs), J blocks of rows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.matching import (
    given,
    graph_of,
    need,
    new_node,
    remove_dead,
    replace,
)
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import role_of, set_role
from echoatt_exporter.graph.weights import add_lazy, weight_of
from echoatt_exporter.quantise.block_quantizer import (
    BLOCK_SIZE,
    Bits,
    packed_shape,
    quantize_blocks,
)

_DOMAIN = "com.microsoft"
_OPSET = 1

_ACTIVATION_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class QuantizeWeights(RewritePass):
    """Replaces MatMul with a constant weight by `MatMulNBits` (com.microsoft).

    Blocks of rows are quantised by `quantize_blocks`. The pass acts on

    1. a MatMul whose second operand is a [K, N] float32 or float16 initializer; where K is not a
       whole number of blocks the last block is padded with zeros;
    2. several such MatMul nodes of one weight: it is quantised once.

    It leaves alone products of two activations (attention), weights that are looked up (Gather: a
    tied embedding keeps its float table while the LM head gets a quantised weight of its own) and
    bfloat16, for which the CPU has no kernel.

    Weights are quantised when they are written, one at a time, not now.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PACKED})
    gives = frozenset({Property.QUANTISED})
    roots = frozenset({("", "MatMul")})

    def __init__(
        self,
        bits: Bits,
        block_size: int = BLOCK_SIZE,
        accuracy_level: int = 4,
    ) -> None:
        """Take how to quantise.

        Args:
            bits: Bits a weight, 4 or 8.
            block_size: Rows that share a scale: 16, 32, 64, 128 or 256.
            accuracy_level: What the kernel computes in; 4 (int8) is the fast one on CPU, and 8-bit
                weights are hundreds of times slower with another.

        Raises:
            ValueError: `bits` or `block_size` is none that the operator knows.
        """
        if bits not in (4, 8):
            raise ValueError(f"bits is {bits}, expected 4 or 8")
        if block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size is {block_size}, expected 16, 32, 64, 128 or 256")
        self._bits = bits
        self._block_size = block_size
        self._accuracy_level = accuracy_level
        self._done: dict[ir.Value, list[ir.Value]] = {}

    def prepare(self) -> None:
        """Forget the weights of an earlier model."""
        self._done = {}

    def rewrite(self, node: ir.Node) -> None:
        """Quantise one product's weight."""
        graph = graph_of(node)
        weight = given(node.inputs[1])
        tensor = weight_of(weight, rank=2)
        need(tensor.dtype in _ACTIVATION_TYPES, f"{weight.name} is {tensor.dtype}")
        rows, columns = (int(size) for size in tensor.shape.numpy())
        if weight not in self._done:
            self._done[weight] = list(self._register(graph, weight, tensor))
        old = node.outputs[0]
        quantized = new_node(
            "MatMulNBits",
            [node.inputs[0], *self._done[weight]],
            {
                "K": rows,
                "N": columns,
                "bits": self._bits,
                "block_size": self._block_size,
                "accuracy_level": self._accuracy_level,
            },
            after=old,
            suffix=f"int{self._bits}",
            domain=_DOMAIN,
        )
        graph.insert_before(node, quantized)
        replace(old, quantized.outputs[0])
        remove_dead(graph, [old])
        graph.opset_imports.setdefault(_DOMAIN, _OPSET)

    def _register(
        self, graph: ir.Graph, weight: ir.Value, tensor: ir.TensorProtocol
    ) -> Iterator[ir.Value]:
        """Add the weight's packed bits and scales as initializers."""
        quantized = _QuantizedWeight(tensor, self._bits, self._block_size)
        rows, columns = (int(size) for size in tensor.shape.numpy())
        shape = packed_shape(rows, columns, self._bits, self._block_size)
        parts = [("q", ir.DataType.UINT8, shape), ("scales", tensor.dtype, shape[:2])]
        for index, (suffix, dtype, part_shape) in enumerate(parts):
            compute = functools.partial(quantized.take, index)
            value = add_lazy(graph, f"{weight.name}.{suffix}", compute, dtype, part_shape)
            set_role(value, role_of(weight))
            yield value


class _QuantizedWeight:
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
