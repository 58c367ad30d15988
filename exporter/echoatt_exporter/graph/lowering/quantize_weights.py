"""Quantises constant weights of matrix products to 4 or 8 bits.

K rows (inputs), N columns (outputs), J blocks of rows.
"""

from __future__ import annotations

import onnx_ir as ir

from echoatt_exporter.graph.graph_pass import RewritePass
from echoatt_exporter.graph.lowering.quantized_weight import (
    QUANTISABLE,
    QuantizedWeight,
    add_quantized,
    multiply_quantized,
)
from echoatt_exporter.graph.matching import given, graph_of, need
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import Kind, Use, role_of
from echoatt_exporter.graph.weights import separate_names, weight_of
from echoatt_runtime.contract import Quantisation


class QuantizeWeights(RewritePass):
    """Replaces MatMul with a constant weight by `MatMulNBits` (com.microsoft).

    Blocks of rows are quantised by `quantize_blocks`. The pass acts on

    1. a MatMul whose second operand is a [K, N] float32 or float16 initializer; where K is not a
       whole number of blocks the last block is padded with zeros;
    2. several such MatMul nodes of one weight: it is quantised once.

    It leaves alone products of two activations (attention) and bfloat16, for which the CPU has no
    kernel.

    Weights are quantised when they are written, one at a time, not now.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.PACKED})
    gives = frozenset({Property.QUANTISED})
    roots = frozenset({("", "MatMul")})

    def __init__(self, quantisation: Quantisation, accuracy_level: int = 4) -> None:
        """Take how to quantise.

        Args:
            quantisation: To how many bits.
            accuracy_level: What the kernel computes in; 4 (int8) is the fast one on CPU, and 8-bit
                weights are hundreds of times slower with another.
        """
        self._quantisation = quantisation
        self._accuracy_level = accuracy_level
        self._done: dict[ir.Value, QuantizedWeight] = {}

    def prepare(self) -> None:
        """Forget the weights of an earlier model."""
        self._done = {}

    def rewrite(self, node: ir.Node) -> None:
        """Quantise one product's weight."""
        weight = given(node.inputs[1])
        tensor = weight_of(weight, rank=2)
        need(tensor.dtype in QUANTISABLE, f"{weight.name} is {tensor.dtype}")
        role, chosen = role_of(weight), self._quantisation
        is_head = Use(Kind.HEAD) in {use for part in role for use in part.uses}
        names = [name.removesuffix(".weight") for name in separate_names(str(weight.name))]
        widths = {chosen.head_bits if is_head else chosen.bits_of(name) for name in names}
        need(len(widths) == 1, f"{weight.name} has parts of different widths")
        (bits,) = widths
        size = chosen.block_size
        if weight not in self._done:
            self._done[weight] = add_quantized(
                graph_of(node), str(weight.name), tensor, bits, size, role
            )
        multiply_quantized(node, self._done[weight], bits, size, self._accuracy_level)
