"""How a staged bundle is written: weights and graph, manifest, check, verification, publication.

Everything is written and verified in the staging folder and only then moved into place, so that a
bundle appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from echoatt_exporter.bundle.place import BundlePath, writing_to
from echoatt_exporter.bundle.publish import publish
from echoatt_exporter.bundle.room import check_room
from echoatt_exporter.bundle.stage import Stage
from echoatt_exporter.graph import apart, check_file, written_once
from echoatt_runtime.bundle import Bundle, file_sha256, read_onnx_file
from echoatt_runtime.contract import (
    COMPANION,
    METADATA_KEY,
    WEIGHTS,
    BundleFile,
    Manifest,
    Specification,
    Verification,
    required_by,
)
from echoatt_runtime.ort import has_cuda

# Tensors up to this size stay in the model file: shapes and scalars, needed at once.
_INLINE_BYTES = 1024

# Bounds what is held in memory while lazily evaluated weights are written.
_IN_FLIGHT_BYTES = 256 * 2**20


def write_bundle(
    model: ir.Model,
    specification: Specification,
    stage: Stage,
    out: BundlePath,
    *,
    force: bool,
    verify: Callable[[Bundle], Verification | None],
    on_weight: Callable[[int, int], None] = lambda _done, _total: None,
) -> Manifest:
    """Write, check, verify and publish a bundle.

    Args:
        model: The finished graph.
        specification: What it computes.
        stage: Where it is made; the companions are there already.
        out: Where it goes.
        force: Overwrite what is there.
        verify: Compares the staged bundle with PyTorch; raises what it must.
        on_weight: Called with (tensors written, tensors in all).

    Returns:
        The manifest as published.

    Raises:
        OutputExistsError: Something is there already, and not `force`.
        ExportError: No room, or the file system refuses.
        ContractError: The written file is not clean.
    """
    staged = BundlePath(stage.bundle / out.model.name)
    with writing_to(out.model):
        companions = [_describe(path, COMPANION) for path in sorted(stage.bundle.iterdir())]
        check_room(out.place, _weight_bytes(model))
        _save(model, staged, on_weight)
        manifest = Manifest(
            exporter_version=importlib.metadata.version("echoatt"),
            specification=specification,
            requires=required_by(specification),
            graph_sha256=read_onnx_file(staged.model).graph_sha256,
            files=(_describe(staged.weights, WEIGHTS), *companions),
        )
        bare = staged.model.stat().st_size
        _stamp(staged.model, bare, manifest)
        check_file(staged.model, _checking_device(specification))
        verification = verify(Bundle.open(staged.model))
        manifest = dataclasses.replace(manifest, verification=verification)
        _stamp(staged.model, bare, manifest)
        publish(stage, out, force=force)
    return manifest


def _describe(path: Path, role: str) -> BundleFile:
    return BundleFile(
        name=path.name, role=role, bytes=path.stat().st_size, sha256=file_sha256(path)
    )


def _weight_bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in apart(model.graph))


def _save(model: ir.Model, staged: BundlePath, on_weight: Callable[[int, int], None]) -> None:
    # A graph read from a bundle brings that bundle's
    model.metadata_props.pop(METADATA_KEY, None)
    done = 0

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        on_weight(done, info.total)

    with written_once(model.graph):
        ir.external_data.unload_from_model(
            model,
            staged.model.parent,
            staged.weights.name,
            size_threshold_bytes=_INLINE_BYTES,
            callback=report,
            max_workers=2,
            max_in_flight_bytes=_IN_FLIGHT_BYTES,
        )
    onnx.save(ir.to_proto(model), staged.model)
    # A graph without a single large tensor still has the file that its manifest names
    staged.weights.touch()


def _checking_device(specification: Specification) -> str | None:
    """The device that loads the written file for the check."""
    if specification.device == "cuda" and has_cuda():
        return "cuda"
    # ONNX Runtime's CPU provider has no bfloat16 MatMul
    return None if specification.dtype == "bf16" else "cpu"


def _stamp(path: Path, bare: int, manifest: Manifest) -> None:
    """Write the manifest behind what a model file has in its first `bare` bytes.

    Fields of a protobuf message may come one after the other in any order, so nothing that is
    there is written again.
    """
    entry = onnx.ModelProto()
    onnx.helper.set_model_props(entry, {METADATA_KEY: manifest.to_json()})
    with path.open("r+b") as file:
        file.truncate(bare)
        file.seek(bare)
        file.write(entry.SerializeToString())
