"""One traced model for the whole folder: tracing is what takes the time here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import onnx_ir as ir

    from echoatt_exporter.parity import ReferenceRun
    from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
    from echoatt_runtime.contract.manifest import Manifest

# The caches grow once on the way
CONTEXT = 300


@dataclass(frozen=True, eq=False)
class Exported:
    """A student, its traced graph (before any pass) and PyTorch's side of the comparison."""

    student: EchoAttForCausalLM
    manifest: Manifest
    graph_file: Path
    reference: ReferenceRun


def make_manifest(student: EchoAttForCausalLM, dtype: str = "fp32") -> Manifest:
    from echoatt_exporter.architecture import architecture_of
    from echoatt_runtime.contract.manifest import Manifest, SourceCheckpoint

    architecture = architecture_of(student.config.get_text_config())
    return Manifest(
        exporter_version="0",
        **architecture.manifest_fields(),
        sources=tuple(student.sources),
        head_orders=(),
        dtype=dtype,
        device="cuda" if dtype in ("fp16", "bf16") else "cpu",
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
        weights_file="model.onnx.data",
        weights_bytes=0,
        source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
        verification=None,
    )


@pytest.fixture(scope="session")
def export(tmp_path_factory: Any, tiny_model: Any) -> Callable[..., Exported]:
    """`export(name, sources, dtype, **config_fields)` traces a tiny model."""
    import onnx_ir as ir
    import torch

    from echoatt_exporter.parity import record_reference
    from echoatt_exporter.share.apply import share_attention
    from echoatt_exporter.trace.tracer import trace_student
    from echoatt_runtime.contract.plan import SharingPlan

    def build(name: str, sources: tuple[int, ...], dtype: str = "fp32", **fields: Any) -> Exported:
        torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
        fields = {"num_hidden_layers": len(sources), "max_position_embeddings": CONTEXT} | fields
        teacher = tiny_model(name, **fields).to(torch_dtype)
        student = share_attention(teacher, SharingPlan(sources))
        manifest = make_manifest(student, dtype)
        reference = record_reference(student, manifest, tokenizer_dir=None)
        file = tmp_path_factory.mktemp(name) / "graph.onnx"
        ir.save(trace_student(student, manifest), file)
        return Exported(student, manifest, file, reference)

    return build


@pytest.fixture(scope="session")
def sliding(export: Any) -> Exported:
    """Mistral with a window of 5 tokens; layers 2 and 3 follow layers 1 and 0."""
    exported: Exported = export("mistral", (0, 1, 1, 0))
    return exported


@pytest.fixture(scope="session")
def write(tmp_path_factory: Any) -> Callable[[ir.Model, Manifest], Path]:
    """`write(model, manifest)` writes a graph as a bundle and gives its path."""
    import onnx_ir as ir

    from echoatt_runtime.contract.manifest import METADATA_KEY

    def save(model: ir.Model, manifest: Manifest) -> Path:
        path: Path = tmp_path_factory.mktemp("bundle") / "model.onnx"
        weights = path.with_name(manifest.weights_file)
        for _ in range(2):  # the manifest has the size of the file that is written with it
            if weights.exists():
                size = weights.stat().st_size
                weights.unlink()
                manifest = dataclasses.replace(manifest, weights_bytes=size)
            model.metadata_props[METADATA_KEY] = manifest.to_json()
            ir.save(model, path, external_data=weights.name)
        return path

    return save
