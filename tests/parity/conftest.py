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
# As real ones are: longer than prompts, and behind the first growth of the caches
WINDOW = 280
PAST_WINDOW = 320


@dataclass(frozen=True, eq=False)
class Exported:
    """A student, a traced graph (before any pass) and PyTorch's side of the comparison."""

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
    device = "cuda" if dtype in ("fp16", "bf16") else "cpu"
    return Specification(
        **fields,
        plan=plan,
        dtype=dtype,
        device=device,
        caches=lay_out_caches(plan, fields["kv_heads"], fields["head_dims"], compute, device),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
        source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
    )


@pytest.fixture(scope="session")
def export(tmp_path_factory: Any, tiny_model: Any) -> Callable[..., Exported]:
    """`export(name, sources, dtype, shared, **config_fields)` traces a tiny model.

    The trace is the student's, or the teacher's where it is not to be shared; PyTorch's side is the
    student's.
    """
    import onnx_ir as ir
    import torch

    from echoatt_exporter.parity import record_reference
    from echoatt_exporter.share.apply import share_attention
    from echoatt_exporter.trace.tracer import trace_student
    from echoatt_runtime.contract import SharingPlan

    def build(
        name: str,
        sources: tuple[int, ...],
        dtype: str = "fp32",
        *,
        shared: bool = True,
        **fields: Any,
    ) -> Exported:
        torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
        fields = {"num_hidden_layers": len(sources), "max_position_embeddings": CONTEXT} | fields
        teacher = tiny_model(name, **fields).to(torch_dtype)
        student = share_attention(teacher, SharingPlan(sources))
        specification = specify(student, dtype)
        reference = record_reference(student, specification, tokenizer_dir=None)
        file = tmp_path_factory.mktemp(name) / "graph.onnx"
        traced = student
        if not shared:
            teacher = tiny_model(name, **fields).to(torch_dtype)
            traced = share_attention(teacher, SharingPlan.unshared(len(sources)))
        ir.save(trace_student(traced, specify(traced, dtype)), file)
        return Exported(student, specification, file, reference)

    return build


@pytest.fixture(scope="session")
def sliding(export: Any) -> Exported:
    """Mistral with a window of 5 tokens; layers 2 and 3 follow layers 1 and 0."""
    exported: Exported = export("mistral", (0, 1, 1, 0))
    return exported


@pytest.fixture(scope="session")
def unshared(export: Any) -> Exported:
    """Mistral with a window of 280 tokens, traced unshared: passes apply the same plan."""
    fields = {"sliding_window": WINDOW, "max_position_embeddings": PAST_WINDOW}
    exported: Exported = export("mistral", (0, 1, 1, 0), shared=False, **fields)
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
