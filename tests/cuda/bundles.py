"""Bundles for CUDA of tiny random models: each model is traced once, for every dtype and plan."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from tests.quantisation import to_nearest
from tests.tiny_models import build_tiny_model
from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of, specification_fields
from echoatt_exporter.graph import rewrite_pipeline, run_pipeline
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.trace.tracer import trace_student
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import (
    DTYPES,
    METADATA_KEY,
    BundleFile,
    Manifest,
    SharingPlan,
    SourceCheckpoint,
    Specification,
    lay_out_caches,
)

CONTEXT = 600
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Trace:
    """An unshared model's graph, in float16.

    Attributes:
        specification: Of it.
    """

    def __init__(self, name: str, layers: int, *, kept: Path | None = None, **fields: Any) -> None:
        """Trace a tiny model, or read the trace from the file `kept`, which is made first."""
        self._name = name
        self._fields = {"num_hidden_layers": layers, "max_position_embeddings": CONTEXT} | fields
        student = share_attention(self.teacher(), SharingPlan.unshared(layers))
        sizes = specification_fields(architecture_of(student.config.get_text_config()))
        self.specification = Specification(
            **sizes,
            plan=SharingPlan.unshared(layers),
            dtype="fp16",
            device="cuda",
            caches=_caches(SharingPlan.unshared(layers), sizes, "fp16"),
            bos_token_id=1,
            eos_token_ids=(2,),
            pad_token_id=None,
            source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
        )
        if kept is None or not kept.is_file():
            model = trace_student(student, self.specification)
            self._model = ir.to_proto(model)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(self._model.SerializeToString())
        else:
            self._model = onnx.load(kept)

    def teacher(self) -> PreTrainedModel:
        """The model itself, in float16."""
        return in_dtype(build_tiny_model(self._name, **self._fields), torch.float16)

    def bundle(self, folder: Path, dtype: str, plan: SharingPlan) -> Bundle:
        """Write the bundle of a dtype and a plan."""
        sizes = {name: getattr(self.specification, name) for name in ("kv_heads", "head_dims")}
        bits = DTYPES[dtype].bits
        specification = dataclasses.replace(
            self.specification,
            plan=plan,
            dtype=dtype,
            caches=_caches(plan, sizes, dtype),
            quantisation=None if bits is None else to_nearest(bits),
        )
        model = ir.from_proto(copy.deepcopy(self._model))
        if dtype == "bf16":
            _to_bfloat16(model)
        run_pipeline(model, rewrite_pipeline(specification))
        path, data = folder / "model.onnx", folder / "model.onnx.data"
        for _ in range(2):
            data.unlink(missing_ok=True)
            ir.save(model, path, external_data=data.name, size_threshold_bytes=1024)
            file = BundleFile(
                name=data.name, role="weights", bytes=data.stat().st_size, sha256=None
            )
            manifest = Manifest(exporter_version="0", specification=specification, files=(file,))
            model.metadata_props[METADATA_KEY] = manifest.to_json()
        return Bundle.open(path)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a model's parameters another dtype, and as a load does leave its buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _caches(plan: SharingPlan, sizes: dict[str, Any], dtype: str) -> Any:
    elements = DTYPES[dtype].compute_on("cuda").name
    return lay_out_caches(plan, sizes["kv_heads"], sizes["head_dims"], elements, "cuda")


def _to_bfloat16(model: ir.Model) -> None:
    """What tracing in bfloat16 gives: the same nodes on other elements."""
    half, other = _HALVES
    for node in model.graph.all_nodes():
        if node.op_type == "Cast" and node.attributes.get_int("to") == half:
            node.attributes["to"] = ir.AttrInt64("to", other)
    graph = model.graph
    for value in (*graph.inputs, *(o for node in graph.all_nodes() for o in node.outputs)):
        if value.dtype == half:
            value.dtype = other
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == half:
            numbers = torch.from_numpy(tensor.numpy().copy()).to(torch.bfloat16)
            value.const_value = ir.tensor(numbers, name=value.name)
            value.dtype = other
