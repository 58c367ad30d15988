"""Opens bundles, as they are or with a few nodes changed in memory.

A changed graph is given to ONNX Runtime as bytes together with the folder of the bundle's weight
file, so that nothing is written and no weight is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from echoatt_exporter.graph.attention import find_attention
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import DTYPES, Specification
from echoatt_runtime.executor import Executor, executor_of, open_executor
from echoatt_runtime.ort import PROVIDERS, SessionOptions, has_cuda, open_session

# MatMulNBits' attribute: what it computes in
_FLOAT32_ACCURACY = 1

Change = Callable[[ir.Model], None]


def choose_device(specification: Specification) -> str:
    """The device to verify a bundle on: its own, or the CPU where there is no GPU.

    Args:
        specification: The bundle's.
    """
    return "cuda" if specification.device == "cuda" and has_cuda() else "cpu"


def needs_float32(specification: Specification, device: str) -> bool:
    """Whether the device has no kernels for the bundle's dtype, so that it computes in float32."""
    return specification.dtype == "bf16" and device == "cpu"


def describe(specification: Specification, device: str) -> str:
    """What runs the bundle, for the report."""
    changed = ", computed in float32" if needs_float32(specification, device) else ""
    return PROVIDERS[device] + changed


def open_bundle(
    bundle: Bundle, device: str, *, exact: bool = False, contexts: bool = False
) -> Executor:
    """Open a bundle for a comparison.

    Args:
        bundle: The bundle.
        device: `cpu` or `cuda`.
        exact: Multiply by quantised weights as they are, where a CPU would round activations too.
        contexts: Give every layer's attention output out, see `context_name`.

    Raises:
        BundleError: The bundle is damaged.
        DeviceError: The device cannot run it.
    """
    specification = bundle.specification
    changes: list[Change] = []
    if needs_float32(specification, device):
        changes.append(_compute_in_float32)
        caches = tuple(
            dataclasses.replace(cache, element_type=DTYPES["fp32"].compute.name)
            for cache in specification.caches
        )
        specification = dataclasses.replace(specification, dtype="fp32", caches=caches)
    if specification.dtype == "fp16" and device == "cpu":
        changes.append(_multiply_16_bit_weights_in_float32)
    if exact and device == "cpu":
        changes.append(_multiply_in_float32)
    if contexts:
        changes.append(_give_contexts)
    if not changes:
        return open_executor(bundle, device, foreign=True)
    model = ir.load(bundle.model)
    for change in changes:
        change(model)
    options = SessionOptions(
        device=device,
        # Optimisers would do the conversions below when the model is loaded, and keep the results
        optimise=False,
        weights_folder=bundle.model.parent,
    )
    session = open_session(ir.to_proto(model).SerializeToString(), options, str(bundle.model))
    layers = range(specification.num_layers) if contexts else ()
    return executor_of(session, specification, [context_name(layer) for layer in layers])


def context_name(layer: int) -> str:
    """The extra output with a layer's attention output, [B, N, G·S, D]."""
    return f"parity.context.{layer}"


def _give_contexts(model: ir.Model) -> None:
    graph = model.graph
    layers = sum(str(value.name).endswith(".value") for value in graph.outputs)
    for layer in range(layers):
        context = find_attention(graph, layer).context
        # numpy has no bfloat16
        output = ir.node("Cast", [context.outputs[0]], {"to": ir.DataType.FLOAT}).outputs[0]
        output.name, output.type = context_name(layer), ir.TensorType(ir.DataType.FLOAT)
        graph.insert_after(context, [node for node in [output.producer()] if node is not None])
        graph.outputs.append(output)


def _multiply_in_float32(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32_ACCURACY)


def _multiply_16_bit_weights_in_float32(model: ir.Model) -> None:
    """Convert each 16-bit weight when it is multiplied by, with the operand and the result.

    It is what ONNX Runtime does on a CPU, but for the float32 copy of every weight that it would
    keep: a conversion depends on no input, and so all of them are done when the model is loaded or,
    with optimisers off, at the start of every run. Inside a branch they wait for their turn.
    """
    graph = model.graph
    always = ir.Value(
        name="parity.always", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
    )
    always.const_value = ir.tensor(True, name=always.name)
    graph.register_initializer(always)
    for node in list(graph):
        operand, weight = node.inputs if node.op_type == "MatMul" else (None, None)
        if operand is None or weight is None or not weight.is_initializer():
            continue
        if weight.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        old = node.outputs[0]
        branches = {
            name: _product(operand, weight, old, name) for name in ("then_branch", "else_branch")
        }
        late = ir.node("If", [always], branches, name=node.name)
        late.outputs[0].type, late.outputs[0].shape = old.type, old.shape
        graph.insert_before(node, late)
        ir.convenience.replace_all_uses_with(old, late.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _product(operand: ir.Value, weight: ir.Value, result: ir.Value, branch: str) -> ir.Graph:
    """A branch: the product of two values of the outer graph in float32, in the result's type."""
    wide = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}) for value in (operand, weight)]
    product = ir.node("MatMul", [node.outputs[0] for node in wide])
    assert result.dtype is not None  # noqa: S101 - traced graphs are typed throughout
    narrow = ir.node("Cast", [product.outputs[0]], {"to": result.dtype})
    nodes = [*wide, product, narrow]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{result.name}.{branch}.{number}"
    output = narrow.outputs[0]
    output.type, output.shape = ir.TensorType(result.dtype), result.shape
    return ir.Graph([], [output], nodes=nodes, name=f"{result.name}.{branch}")


def _compute_in_float32(model: ir.Model) -> None:
    """Turn a bfloat16 graph into a float32 one; the weights stay, and are converted when used."""
    _multiply_16_bit_weights_in_float32(model)
    graph = model.graph
    for node in model.graph.all_nodes():
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    weights = [v for v in graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    for value in (*graph.inputs, *(o for node in graph.all_nodes() for o in node.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for weight in weights:
        for node, index in weight.uses():
            if node.op_type == "Cast":
                continue
            if node.op_type == "Gather":  # of the embedding table: convert what it looks up
                looked_up = node.outputs[0]
                looked_up.dtype = ir.DataType.BFLOAT16
                widened = ir.node("Cast", [looked_up], {"to": ir.DataType.FLOAT})
                ir.convenience.replace_all_uses_with(looked_up, widened.outputs[0])
                widened.replace_input_with(0, looked_up)
                graph.insert_after(node, widened)
            else:
                widened = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
                graph.insert_before(node, widened)
                node.replace_input_with(index, widened.outputs[0])
