"""A checkpoint and a sharing plan to a verified bundle.

Whatever can be refused without the weights is refused before they are read, the cheapest first.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from echoatt_exporter.architecture import specification_fields
from echoatt_exporter.bundle import (
    BundlePath,
    check_companions,
    check_room,
    copy_checkpoint_files,
    least_bytes,
    open_stage,
    sweep,
    write_bundle,
    writing_to,
)
from echoatt_exporter.errors import ExportError
from echoatt_exporter.export_report import ExportReport, OnStep, ignore_step
from echoatt_exporter.graph import export_pipeline, run_pipeline
from echoatt_exporter.parity import (
    ParityReport,
    ReferenceRun,
    UnroundedRun,
    check_float16_range,
    compare,
    record_reference,
    record_unrounded,
    verified_context,
)
from echoatt_exporter.quantise.quantise import RoundingChoice, quantise_student
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_exporter.share.outline import CheckpointOutline, read_outline
from echoatt_exporter.share.special_tokens import special_tokens
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_exporter.texts import Text
from echoatt_exporter.trace.tracer import computed_in, graph_dtype, trace_student
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import (
    DEVICES,
    DTYPES,
    SharingPlan,
    SourceCheckpoint,
    Specification,
    Verification,
    lay_out_caches,
)


def export_bundle(
    model_dir: str | Path,
    out: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    dtype: str = "fp32",
    device: str = "cpu",
    rounding: RoundingChoice | None = None,
    verify: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    on_step: OnStep = ignore_step,
) -> ExportReport:
    """Export a checkpoint as a bundle that the EchoAtt runtime runs.

    Args:
        model_dir: A student's directory, or any supported Hugging Face directory.
        out: A `.onnx` file, or a directory that gets `model.onnx`.
        plan: The sharing plan for a directory that is not a student, or its `follower:source`
            pairs; None shares nothing.
        dtype: Of the weights: fp32, fp16, bf16, int8 or int4.
        device: What the bundle is for: cpu or cuda.
        rounding: How int8 and int4 are rounded; None is calibrated on text of the model's own.
        verify: Compare the bundle with PyTorch before it is published.
        force: Overwrite an existing bundle.
        trust_remote_code: Run code that the checkpoint brings.
        on_step: Told (step, done, total) as the export goes on.

    Returns:
        The report.

    Raises:
        EchoAttError: Bad input, typed and in one line; nothing was published.
    """
    start = time.perf_counter()
    _check_target(dtype, device)
    texts = [] if rounding is None else rounding.read(dtype)
    source, target = Path(model_dir), BundlePath.of(out)
    sweep(target.place)
    target.check_free(force=force)
    on_step("load", 0, 1)
    outline = read_outline(source, plan, trust_remote_code=trust_remote_code)
    tokens = special_tokens(source, outline.text_config, outline.architecture.vocab_size)
    with open_stage(target.place) as stage:
        check_room(target.place, least_bytes(outline, dtype))
        with writing_to(target.model):
            notes = copy_checkpoint_files(source, stage.bundle, trust_remote_code=trust_remote_code)
        check_companions(stage.bundle, target.place, force=force)
        specification = _specification(outline, tokens, dtype=dtype, device=device)
        # What can be refused without the weights has been refused by now
        model, specification, reference = _load_and_trace(
            outline,
            specification,
            rounding or RoundingChoice(),
            texts,
            other_bytes=sum(path.stat().st_size for path in stage.bundle.iterdir()),
            verify=verify,
            trust_remote_code=trust_remote_code,
            on_step=on_step,
        )
        on_step("passes", 0, 1)
        reports = run_pipeline(model, export_pipeline(specification))

        parity: ParityReport | None = None

        def verify_staged(bundle: Bundle) -> Verification | None:
            nonlocal parity
            if reference is None:
                return None
            on_step("verify", 0, 1)
            parity = compare(reference, bundle)
            parity.raise_on_mismatch()
            return parity.verification()

        manifest = write_bundle(
            model,
            specification,
            stage,
            target,
            force=force,
            verify=verify_staged,
            on_weight=lambda done, total: on_step("write", done, total),
        )
    return ExportReport(
        model=target.model,
        manifest=manifest,
        passes=reports,
        parity=parity,
        parameters=reports[-1].after.parameters,
        seconds=time.perf_counter() - start,
        notes=notes,
    )


def _load_and_trace(
    outline: CheckpointOutline,
    specification: Specification,
    rounding: RoundingChoice,
    calibration: Sequence[Text],
    *,
    other_bytes: int,
    verify: bool,
    trust_remote_code: bool,
    on_step: OnStep,
) -> tuple[ir.Model, Specification, ReferenceRun | None]:
    """The graph, its specification, and what PyTorch computes where that is wanted.

    The graph holds the weights it needs; the rest of the student goes with this call, before
    anything is copied.
    """
    student = load_shared(
        outline.directory,
        outline.plan,
        dtype=graph_dtype(specification.dtype),
        trust_remote_code=trust_remote_code,
    )
    texts: Any = {
        "tokenizer_dir": outline.directory,
        "max_context": verified_context(specification),
    }
    unrounded: UnroundedRun | None = None
    if specification.weight_dtype.bits is not None:
        if verify:
            unrounded = record_unrounded(student, specification, **texts)
        specification = quantise_student(
            student,
            specification,
            rounding,
            calibration,
            other_bytes=other_bytes,
            model_dir=outline.directory,
            trust_remote_code=trust_remote_code,
            on_part=on_step,
        )
    if specification.compute.name == "float16":
        on_step("range", 0, 1)
        check_float16_range(student, specification, outline.directory)
    reference: ReferenceRun | None = None
    if verify:
        on_step("reference", 0, 1)
        reference = record_reference(student, specification, unrounded=unrounded, **texts)
    on_step("trace", 0, 1)
    for parameter in student.parameters():
        # Not the buffers: angles of far positions need all of a rotation's frequencies
        parameter.data = parameter.data.to(computed_in(specification))
    model = trace_student(student, specification)
    del student
    gc.collect()
    return model, specification, reference


def _check_target(dtype: str, device: str) -> None:
    if dtype not in DTYPES:
        raise ExportError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device not in DEVICES:
        raise ExportError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if device == "cpu" and dtype in ("fp16", "bf16"):
        raise ExportError(
            f"{dtype} is not for the CPU: ONNX Runtime would convert every weight at every step, or"
            " has no kernel at all; use fp32, int8 or int4, or --device cuda"
        )


def _specification(
    outline: CheckpointOutline, tokens: dict[str, Any], *, dtype: str, device: str
) -> Specification:
    fields = specification_fields(outline.architecture)
    compute = DTYPES[dtype].compute_on(device).name
    return Specification(
        **fields,
        **tokens,
        plan=outline.plan,
        dtype=dtype,
        device=device,
        caches=lay_out_caches(
            outline.plan, fields["kv_heads"], fields["head_dims"], compute, device
        ),
        source_checkpoint=SourceCheckpoint(
            name=outline.directory.resolve().name, sha256=checkpoint_digest(outline.directory)
        ),
    )
