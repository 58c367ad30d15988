"""How many bytes of weights a decoding step reads."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

# Products read their weights whole. What is looked up, such as a token's row, and vectors, such as
# norms, are nothing beside them.
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
_VIEWS = ("Transpose", "Cast", "Identity", "Reshape")


def onnx_weight_bytes(path: Path) -> int:
    """Bytes of the initializers that a graph's matrix products read.

    Args:
        path: An ONNX model; its external data is not read.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    origin = {name: name for name in weights}
    for node in graph.node:
        if node.op_type in _VIEWS and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
    read = {
        origin[name]
        for node in graph.node
        if node.op_type in _PRODUCTS
        for name in node.input
        if name in origin
    }
    return sum(_nbytes(weights[name]) for name in read)


def _nbytes(tensor: onnx.TensorProto) -> int:
    item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * item)
