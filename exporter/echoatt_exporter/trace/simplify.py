"""Tidies what torch's exporter leaves: names, transposed weights, shape arithmetic.

torch's own clean-up would fold each transposed weight into a nameless copy that it keeps in memory.
Here a weight keeps its name, and its transposition is done when it is written.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

# Large enough for every shape and scalar, small enough for no weight.
_FOLD_LIMIT_BYTES = 1024

_PREFIX = "decoder."


def simplify(model: ir.Model) -> None:
    """Tidy a freshly traced model in place. Computes nothing with the weights."""
    _fold_weight_transposes(model)
    onnxscript.optimizer.optimize(
        model, input_size_limit=_FOLD_LIMIT_BYTES, output_size_limit=_FOLD_LIMIT_BYTES
    )
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    IdentityEliminationPass()(model)
    _drop_idle_reshapes(model)
    _strip_prefix(model)
    # Where torch was in the model's source: paths of the machine that exported it
    for node in model.graph:
        node.metadata_props.clear()
    model.producer_name, model.producer_version = "echoatt", None


def _fold_weight_transposes(model: ir.Model) -> None:
    """Replace `MatMul(x, Transpose(weight))` by a product with a weight transposed on writing."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose" or (weight := node.inputs[0]) is None:
            continue
        tensor = weight.const_value
        permutation = node.attributes.get_ints("perm", ())
        if tensor is None or not weight.is_initializer() or tuple(permutation) != (1, 0):
            continue
        only_use = len(weight.uses()) == 1
        name = weight.name if only_use else f"{weight.name}.transposed"
        assert name is not None  # noqa: S101 - an initializer has a name
        transposed = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(reversed(tensor.shape.numpy())),
            const_value=_transposed(tensor, name),
        )
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
        graph.remove(node, safe=True)
        if only_use:
            del graph.initializers[name]
        graph.register_initializer(transposed)


def _drop_idle_reshapes(model: ir.Model) -> None:
    """Let readers of a Reshape to the shape that its operand has read the operand.

    Torch's symbols are proven equal where they are the same.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape" or (data := node.inputs[0]) is None:
            continue
        result = node.outputs[0]
        if data.shape is None or result.shape is None or result.is_graph_output():
            continue
        dims = list(data.shape)
        known = all(isinstance(dim, int) or dim.value is not None for dim in dims)
        if known and dims == list(result.shape):
            ir.convenience.replace_all_uses_with(result, data)
            model.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def _transposed(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(
        evaluate, dtype=tensor.dtype, shape=ir.Shape(reversed(tensor.shape.numpy())), name=name
    )


def _strip_prefix(model: ir.Model) -> None:
    """Call the weights what the teacher's checkpoint calls them."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith(_PREFIX):
            del graph.initializers[name]
            value.name = re.sub(rf"^{re.escape(_PREFIX)}", "", name)
            graph.register_initializer(value)
