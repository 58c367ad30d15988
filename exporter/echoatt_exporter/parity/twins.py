"""Opens bundles, as they are or with a few nodes changed in memory.

A changed graph is given to ONNX Runtime as bytes together with the folder of the bundle's weight
file, so that nothing is written and no weight is copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from echoatt_exporter.passes._attention import find_attention
from echoatt_runtime._onnx_metadata import read_metadata
from echoatt_runtime.errors import DeviceError
from echoatt_runtime.manifest import Manifest
from echoatt_runtime.session import Session, open_session

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ERRORS_ONLY = 3
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# MatMulNBits' attribute: what it computes in
_FLOAT32_ACCURACY = 1

Change = Callable[[ir.Model], None]


def read_manifest(path: Path) -> Manifest:
    """A bundle's manifest, without its weights.

    Raises:
        BundleError: not an ONNX file, or none with a manifest that this version understands.
    """
    return Manifest.from_metadata(read_metadata(path), str(path))


def choose_device(manifest: Manifest, path: Path) -> str:
    """The device to verify a bundle on: its own, or the CPU where there is no GPU.

    Args:
        manifest: the bundle's.
        path: its model file.
    """
    if manifest.device != "cuda" or _PROVIDERS["cuda"] not in (
        onnxruntime.get_available_providers()
    ):
        return "cpu"
    try:
        open_session(path, "cuda")
    except DeviceError:
        return "cpu"
    return "cuda"


def needs_float32(manifest: Manifest, device: str) -> bool:
    """Whether the device has no kernels for the bundle's dtype, so that it computes in float32."""
    return manifest.dtype == "bf16" and device == "cpu"


def describe(manifest: Manifest, device: str) -> str:
    """What runs the bundle, for the report."""
    changed = ", computed in float32" if needs_float32(manifest, device) else ""
    return _PROVIDERS[device] + changed


def open_bundle(
    path: Path, manifest: Manifest, device: str, *, exact: bool = False, contexts: bool = False
) -> Session:
    """Open a bundle for a comparison.

    Args:
        path: the model file.
        manifest: what the file says of itself.
        device: ``cpu`` or ``cuda``.
        exact: multiply by quantised weights in float32 instead of rounding activations too.
        contexts: give every layer's attention output out, see :func:`context_name`.

    Raises:
        BundleError: the bundle is damaged.
        DeviceError: the device cannot run it.
    """
    changes: list[Change] = []
    if needs_float32(manifest, device):
        changes.append(_compute_in_float32)
        manifest = dataclasses.replace(manifest, dtype="fp32")
    if exact:
        changes.append(_multiply_in_float32)
    if contexts:
        changes.append(_give_contexts)
    if not changes:
        return open_session(path, device)
    model = ir.load(path)
    for change in changes:
        change(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_mem_pattern = False
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.resolve().parent))
    ort_session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        options,
        providers=[_PROVIDERS[device]],
        # Folding the conversions below would keep a float32 copy of every weight
        disabled_optimizers=["ConstantFolding"],
    )
    return Session(path, manifest, device, ort_session)


def context_name(layer: int) -> str:
    """The extra output with a layer's attention output, [B, N, G·S, D]."""
    return f"parity.context.{layer}"


def _give_contexts(model: ir.Model) -> None:
    graph = model.graph
    layers = sum(str(value.name).endswith(".value") for value in graph.outputs)
    for layer in range(layers):
        context = find_attention(graph, layer).context
        output = ir.node("Identity", [context.outputs[0]]).outputs[0]
        output.name, output.type = context_name(layer), context.outputs[0].type
        graph.insert_after(context, [node for node in [output.producer()] if node is not None])
        graph.outputs.append(output)


def _multiply_in_float32(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32_ACCURACY)


def _compute_in_float32(model: ir.Model) -> None:
    """Keep the bfloat16 weights, and convert each to float32 whenever it is used."""
    graph = model.graph
    for node in graph:
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for weight in list(graph.initializers.values()):
        if weight.dtype == ir.DataType.BFLOAT16:
            widened = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
            ir.convenience.replace_all_uses_with(weight, widened.outputs[0])
            widened.replace_input_with(0, weight)
            graph.insert_before(graph[0], widened)
    weights = set(graph.initializers.values())
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == ir.DataType.BFLOAT16 and value not in weights:
            value.dtype = ir.DataType.FLOAT
