"""One traced model for the whole folder: tracing is what takes the time here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import onnx_ir as ir

    from echoatt_exporter.parity import ReferenceRun
    from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
    from echoatt_runtime.bundle import Bundle
    from echoatt_runtime.contract import Specification

# The caches grow once on the way
CONTEXT = 300


@dataclass(frozen=True, eq=False)
class Exported:
    """A student, its traced graph (before any pass) and PyTorch's side of the comparison."""

    student: EchoAttForCausalLM
    specification: Specification
    graph_file: Path
    reference: ReferenceRun


def specify(student: EchoAttForCausalLM, dtype: str = "fp32") -> Specification:
    from echoatt_exporter.architecture import architecture_of, specification_fields
    from echoatt_runtime.contract import (
        DTYPES,
        SharingPlan,
        SourceCheckpoint,
        Specification,
        lay_out_caches,
    )

    fields = specification_fields(architecture_of(student.config.get_text_config()))
    plan, compute = SharingPlan(tuple(student.sources)), DTYPES[dtype].compute.name
    return Specification(
        **fields,
        plan=plan,
        dtype=dtype,
        device="cuda" if dtype in ("fp16", "bf16") else "cpu",
        caches=lay_out_caches(plan, fields["kv_heads"], fields["head_dims"], compute),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
        source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
    )


@pytest.fixture(scope="session")
def export(tmp_path_factory: Any, tiny_model: Any) -> Callable[..., Exported]:
    """`export(name, sources, dtype, **config_fields)` traces a tiny model."""
    import onnx_ir as ir
    import torch

    from echoatt_exporter.parity import record_reference
    from echoatt_exporter.share.apply import share_attention
    from echoatt_exporter.trace.tracer import trace_student
    from echoatt_runtime.contract import SharingPlan

    def build(name: str, sources: tuple[int, ...], dtype: str = "fp32", **fields: Any) -> Exported:
        torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
        fields = {"num_hidden_layers": len(sources), "max_position_embeddings": CONTEXT} | fields
        teacher = tiny_model(name, **fields).to(torch_dtype)
        student = share_attention(teacher, SharingPlan(sources))
        specification = specify(student, dtype)
        reference = record_reference(student, specification, tokenizer_dir=None)
        file = tmp_path_factory.mktemp(name) / "graph.onnx"
        ir.save(trace_student(student, specification), file)
        return Exported(student, specification, file, reference)

    return build


@pytest.fixture(scope="session")
def sliding(export: Any) -> Exported:
    """Mistral with a window of 5 tokens; layers 2 and 3 follow layers 1 and 0."""
    exported: Exported = export("mistral", (0, 1, 1, 0))
    return exported


@pytest.fixture(scope="session")
def write(tmp_path_factory: Any) -> Callable[[ir.Model, Specification], Bundle]:
    """`write(model, specification)` writes a graph as a bundle."""
    import onnx_ir as ir

    from echoatt_runtime.bundle import Bundle
    from echoatt_runtime.contract import METADATA_KEY, BundleFile, Manifest

    def save(model: ir.Model, specification: Specification) -> Bundle:
        path: Path = tmp_path_factory.mktemp("bundle") / "model.onnx"
        weights = path.with_name("model.onnx.data")
        ir.save(model, path, external_data=weights.name)
        file = BundleFile(
            name=weights.name, role="weights", bytes=weights.stat().st_size, sha256=None
        )
        manifest = Manifest(exporter_version="0", specification=specification, files=(file,))
        model.metadata_props[METADATA_KEY] = manifest.to_json()
        weights.unlink()
        ir.save(model, path, external_data=weights.name)
        return Bundle.open(path)

    return save
