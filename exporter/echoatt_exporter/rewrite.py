"""An unshared bundle to a shared one, in its graph, with no PyTorch model at hand."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import onnx_ir as ir

from echoatt_exporter.bundle import (
    BundlePath,
    check_companions,
    copy_companions,
    open_stage,
    sweep,
    write_bundle,
    writing_to,
)
from echoatt_exporter.errors import ExportError
from echoatt_exporter.export_report import ExportReport, OnStep, ignore_step
from echoatt_exporter.graph import find_same_bytes, rewrite_pipeline, run_pipeline
from echoatt_runtime.bundle import Bundle, find_model
from echoatt_runtime.contract import SharingPlan, Specification
from echoatt_runtime.errors import PlanError


def rewrite_bundle(
    model_file: str | Path,
    out: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    force: bool = False,
    on_step: OnStep = ignore_step,
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
    sweep(target.place)
    target.check_free(force=force)
    on_step("load", 0, 1)
    bundle = Bundle.open(model_file)
    specification = _shared(bundle, plan)
    with open_stage(target.place) as stage:
        with writing_to(target.model):
            copy_companions(bundle, stage.bundle)
        check_companions(stage.bundle, target.place, force=force)
        model = ir.load(source)
        find_same_bytes(model.graph)
        on_step("passes", 0, 1)
        reports = run_pipeline(model, rewrite_pipeline(specification))
        manifest = write_bundle(
            model,
            specification,
            stage,
            target,
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


def _shared(bundle: Bundle, plan: SharingPlan | str | None) -> Specification:
    """What a bundle becomes with a plan."""
    specification = bundle.specification
    if specification.plan.followers:
        raise PlanError(
            f"{bundle.model} is shared already; rewrite the unshared bundle of the same checkpoint"
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
    caches = tuple(
        cache
        for cache in specification.caches
        if cache.kind != "key" or not plan.is_follower(cache.layer)
    )
    return dataclasses.replace(specification, plan=plan, caches=caches)
