"""A checkpoint and a sharing plan to a verified bundle, and an unshared bundle to a shared one."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from echoatt_exporter.architecture import architecture_of, specification_fields
from echoatt_exporter.bundle.write import (
    BundlePath,
    copy_checkpoint_files,
    copy_companions,
    write_bundle,
)
from echoatt_exporter.errors import ExportError
from echoatt_exporter.graph import PassReport, export_pipeline, run_pipeline
from echoatt_exporter.parity import (
    ParityReport,
    ReferenceRun,
    compare,
    record_reference,
    verified_context,
)
from echoatt_exporter.share.checkpoint import checkpoint_digest, is_student, load_shared
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.trace.tracer import graph_dtype, trace_student
from echoatt_runtime.bundle import Bundle, find_model
from echoatt_runtime.contract import (
    DEVICES,
    DTYPES,
    Manifest,
    SharingPlan,
    SourceCheckpoint,
    Specification,
    Verification,
    lay_out_caches,
)
from echoatt_runtime.errors import PlanError

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export or a rewrite did.

    Attributes:
        model: The published model file.
        manifest: The manifest inside it.
        passes: What each graph pass changed, in order.
        parity: The comparison with PyTorch; None if it was not asked for.
        parameters: Elements of all weights in the graph.
        seconds: Wall time of the whole.
    """

    model: Path
    manifest: Manifest
    passes: Sequence[PassReport]
    parity: ParityReport | None
    parameters: int
    seconds: float

    def to_json(self) -> str:
        """The report for a program to read."""
        data: dict[str, Any] = {
            "model": str(self.model),
            "manifest": json.loads(self.manifest.to_json()),
            "parameters": self.parameters,
            "model_bytes": self.model.stat().st_size,
            "seconds": round(self.seconds, 3),
            "passes": [dataclasses.asdict(report) for report in self.passes],
            "parity": None if self.parity is None else self.parity.to_dict(),
        }
        return json.dumps(data)


def _ignore_step(_name: str, _done: int, _total: int) -> None:
    pass


def export_bundle(
    model_dir: str | Path,
    out: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    dtype: str = "fp32",
    device: str = "cpu",
    verify: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    on_step: OnStep = _ignore_step,
) -> ExportReport:
    """Export a checkpoint as a bundle that the EchoAtt runtime runs.

    Args:
        model_dir: A student's directory, or any supported Hugging Face directory.
        out: A `.onnx` file, or a directory that gets `model.onnx`.
        plan: The sharing plan for a directory that is not a student, or its `follower:source`
            pairs; None shares nothing.
        dtype: Of the weights: fp32, fp16, bf16, int8 or int4.
        device: What the bundle is for: cpu or cuda.
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
    target = BundlePath.of(out)
    target.check_free(force=force)
    source = Path(model_dir)

    on_step("load", 0, 1)
    student = load_shared(
        source,
        plan,
        dtype=graph_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    orders = moved_heads(source, plan)
    specification = _specification(source, student, orders, dtype=dtype, device=device)
    reference: ReferenceRun | None = None
    if verify:
        on_step("reference", 0, 1)
        reference = record_reference(
            student,
            specification,
            tokenizer_dir=source,
            max_context=verified_context(specification),
        )
    on_step("trace", 0, 1)
    model = trace_student(student, specification)
    # The graph holds the weights it needs; the rest of the student may go before anything is copied
    del student
    gc.collect()
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
        target,
        lambda stage: copy_checkpoint_files(source, stage, trust_remote_code=trust_remote_code),
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
    )


def moved_heads(
    model_dir: str | Path, plan: SharingPlan | str | None
) -> tuple[tuple[int, ...], ...]:
    """The head orders that a plan folds into a checkpoint's weights: a student has them already."""
    return plan.head_orders if isinstance(plan, SharingPlan) and not is_student(model_dir) else ()


def rewrite_bundle(
    model_file: str | Path,
    out: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    force: bool = False,
    on_step: OnStep = _ignore_step,
) -> ExportReport:
    """Apply a sharing plan to an unshared bundle's graph, with no PyTorch model at hand.

    The graph's own numbers change as sharing changes them, and there is no PyTorch model to hold it
    against; the new manifest therefore says that it was not verified.

    Args:
        model_file: An unshared bundle's model file.
        out: As in `export_bundle`.
        plan: The sharing plan, or its `follower:source` pairs.
        force: Overwrite an existing bundle.
        on_step: Told (step, done, total) as the rewrite goes on.

    Returns:
        The report.

    Raises:
        EchoAttError: Bad input, typed and in one line; nothing was published.
    """
    start = time.perf_counter()
    source, target = find_model(model_file), BundlePath.of(out)
    if target.model.resolve() == source.resolve():
        raise ExportError(f"{target.model} is the input itself; name another output")
    target.check_free(force=force)
    on_step("load", 0, 1)
    bundle = Bundle.open(model_file)
    specification = bundle.specification
    if specification.plan.followers:
        raise PlanError(
            f"{source} is shared already; rewrite the unshared bundle of the same checkpoint"
        )
    if plan is None:
        raise PlanError("a rewrite needs a sharing plan; pass --plan FILE or --share 3:2,4:2")
    plan = SharingPlan.of(plan, specification.num_layers)
    plan.validate(specification.layer_kinds, specification.query_heads)
    if plan.head_orders:
        raise PlanError(
            "the plan moves heads, which takes the checkpoint's weights and not a bundle's graph;"
            " share the checkpoint first (echoatt share MODEL_DIR STUDENT_DIR --plan FILE) and"
            " export that"
        )
    model = ir.load(source)
    caches = tuple(
        cache
        for cache in specification.caches
        if cache.kind != "key" or not plan.is_follower(cache.layer)
    )
    specification = dataclasses.replace(specification, plan=plan, caches=caches)
    on_step("passes", 0, 1)
    reports = run_pipeline(model, export_pipeline(specification))
    manifest = write_bundle(
        model,
        specification,
        target,
        lambda stage: copy_companions(bundle, stage),
        force=force,
        verify=lambda _: None,
        on_weight=lambda done, total: on_step("write", done, total),
    )
    return ExportReport(
        model=target.model,
        manifest=manifest,
        passes=reports,
        parity=None,
        parameters=reports[-1].after.parameters,
        seconds=time.perf_counter() - start,
    )


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
    source: Path,
    student: EchoAttForCausalLM,
    head_orders: tuple[tuple[int, ...], ...],
    *,
    dtype: str,
    device: str,
) -> Specification:
    generation = student.generation_config
    config = student.config.get_text_config()
    fields = specification_fields(architecture_of(config))
    plan = SharingPlan(tuple(student.sources), head_orders)
    compute = DTYPES[dtype].compute.name

    def token(name: str) -> Any:
        # What generate() would use comes first, as in transformers
        value = getattr(generation, name, None)
        return value if value is not None else getattr(config, name, None)

    eos = token("eos_token_id")
    return Specification(
        **fields,
        plan=plan,
        dtype=dtype,
        device=device,
        caches=lay_out_caches(plan, fields["kv_heads"], fields["head_dims"], compute),
        bos_token_id=token("bos_token_id"),
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        pad_token_id=token("pad_token_id"),
        source_checkpoint=SourceCheckpoint(
            name=source.resolve().name, sha256=checkpoint_digest(source)
        ),
    )
