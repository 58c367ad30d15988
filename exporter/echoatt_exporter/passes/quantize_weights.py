"""Quantises constant weights of matrix products to 4 or 8 bits.

K rows (inputs), N columns (outputs), J blocks of rows.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

# The quantiser itself, and not onnxruntime.quantization's wrapper: importing that one calls
# logging.basicConfig, which would make every library of the process talk.
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from echoatt_exporter.passes._matching import (
    RewritePass,
    given,
    graph_of,
    need,
    new_node,
    remove_dead,
    replace,
)
from echoatt_exporter.passes._weights import add_lazy, weight_of

_DOMAIN = "com.microsoft"
_OPSET = 1
# Columns are quantised independently, so a few at a time give the same result in less memory.
COLUMNS_AT_ONCE = 4096
BLOCK_SIZE = 32

# Of the dtypes that quantise weights
BITS: Final[Mapping[str, Literal[4, 8]]] = {"int4": 4, "int8": 8}
_ACTIVATION_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class QuantizeWeights(RewritePass):
    """Replaces MatMul with a constant weight by `MatMulNBits` (com.microsoft).

    Blocks of rows are quantised by ONNX Runtime's own quantiser (round to nearest). The pass acts
    on

    1. a MatMul whose second operand is a [K, N] float32 or float16 initializer; where K is not a
       whole number of blocks the last block is padded with zeros;
    2. several such MatMul nodes of one weight: it is quantised once.

    It leaves alone products of two activations (attention), weights that are looked up (Gather: a
    tied embedding keeps its float table while the LM head gets a quantised weight of its own) and
    bfloat16, for which the CPU has no kernel.

    Asymmetric blocks (with zero points) are the default: on Gaussian weights their error is 6 %
    lower at 4 bits and 11 % lower at 8, on heavier tails 12 % and 17 %, for 2.5 % more bytes.
    Weights are quantised when they are written, one at a time, not now.
    """

    roots = frozenset({("", "MatMul")})

    def __init__(
        self,
        bits: Literal[4, 8],
        block_size: int = BLOCK_SIZE,
        accuracy_level: int = 4,
        symmetric: bool = False,
    ) -> None:
        """Takes how to quantise.

        Args:
            bits: Bits a weight, 4 or 8.
            block_size: Rows that share a scale: 16, 32, 64, 128 or 256.
            accuracy_level: What the kernel computes in; 4 (int8) is the fast one on CPU, and 8-bit
                weights are hundreds of times slower with another.
            symmetric: Whether blocks have no zero points.

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
        self._symmetric = symmetric
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
            self._done[weight] = list(self._register(graph, str(weight.name), tensor))
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
        self, graph: ir.Graph, name: str, tensor: ir.TensorProtocol
    ) -> Iterator[ir.Value]:
        """Add the weight's packed bits, scales and zero points as initializers."""
        weight = _QuantizedWeight(tensor, self._bits, self._block_size, self._symmetric)
        rows, columns = (int(size) for size in tensor.shape.numpy())
        blocks, blob, packed_points = _block_sizes(rows, self._bits, self._block_size)
        parts = [
            ("q", ir.DataType.UINT8, (columns, blocks, blob)),
            ("scales", tensor.dtype, (columns, blocks)),
            ("zero_points", ir.DataType.UINT8, (columns, packed_points)),
        ]
        for index, (suffix, dtype, shape) in enumerate(parts[:2] if self._symmetric else parts):
            compute = functools.partial(weight.take, index)
            yield add_lazy(graph, f"{name}.{suffix}", compute, dtype, shape)


class _QuantizedWeight:
    """A weight that is quantised when the first of its parts is asked for.

    The other parts are kept until they were asked for too, so that writing a model quantises each
    weight once and keeps none.
    """

    def __init__(
        self, tensor: ir.TensorProtocol, bits: int, block_size: int, symmetric: bool
    ) -> None:
        self._tensor = tensor
        self._bits = bits
        self._block_size = block_size
        self._symmetric = symmetric
        self._waiting: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, index: int) -> np.ndarray:
        """Part 0 packed bits [N, J, blob], 1 scales [N, J], 2 zero points [N, packed J]."""
        with self._lock:
            if index not in self._waiting:
                self._waiting = dict(enumerate(self._quantize()))
            return self._waiting.pop(index)

    def _quantize(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weight_KN = self._tensor.numpy()
        pieces = [
            quantize_blocks(
                weight_KN[:, begin : begin + COLUMNS_AT_ONCE],
                self._bits,
                self._block_size,
                self._symmetric,
            )
            for begin in range(0, weight_KN.shape[1], COLUMNS_AT_ONCE)
        ]
        packed, scales, zero_points = (np.concatenate(part) for part in zip(*pieces, strict=True))
        return packed, scales.astype(weight_KN.dtype), zero_points


def quantize_blocks(
    weight_KN: np.ndarray, bits: int, block_size: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise a weight by ONNX Runtime's own quantiser, in blocks of rows.

    Returns:
        Packed bits uint8 [N, J, blob], scales float32 [N, J], zero points uint8 [N, packed J].
    """
    rows, columns = weight_KN.shape
    blocks, blob, packed_points = _block_sizes(rows, bits, block_size)
    padding = blocks * block_size - rows
    weight_KN = np.pad(weight_KN.astype(np.float32), ((0, padding), (0, 0)))
    packed = np.zeros((columns, blocks, blob), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zero_points = np.zeros((columns, packed_points), np.uint8)
    quantize = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    quantize(
        packed,
        np.ascontiguousarray(weight_KN),
        scales,
        zero_points,
        block_size,
        columns,
        rows,
        symmetric,
    )
    return packed, scales, zero_points


def _block_sizes(rows: int, bits: int, block_size: int) -> tuple[int, int, int]:
    """Blocks of a column, bytes of a block, and bytes of a column's zero points."""
    blocks = math.ceil(rows / block_size)
    return blocks, block_size * bits // 8, math.ceil(blocks * bits / 8)
