"""A model directory against a bundle, for the command line and for a user's tests."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from echoatt_exporter.architecture import architecture_of, specification_fields
from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.parity.compare import compare
from echoatt_exporter.parity.reference import (
    UnroundedRun,
    record_reference,
    record_unrounded,
)
from echoatt_exporter.parity.report import ParityReport
from echoatt_exporter.quantise.stored_weights import round_as_stored
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.trace.tracer import graph_dtype
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import DEVICES, SharingPlan, Specification
from echoatt_runtime.errors import DeviceError, PlanError
from echoatt_runtime.ort import cuda_library, has_cuda


def check_parity(
    model_dir: str | Path,
    bundle: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    max_context: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Compare the model in a directory, run by PyTorch, with a bundle, run by ONNX Runtime.

    PyTorch runs first and is gone before the bundle is opened: memory holds one of them at a time.

    Args:
        model_dir: A student's directory, or a teacher's.
        bundle: The bundle's model file, or a directory with `model.onnx`.
        plan: The sharing plan, or its `follower:source` pairs; None takes the bundle's own.
        max_context: The most tokens of the long text; None goes up to the model's context length.
        device: Where the bundle runs, "cpu" or "cuda"; None is its own device, or the CPU without a
            GPU.
        trust_remote_code: Run code that the checkpoint brings.

    Returns:
        The report; it may say that they differ.

    Raises:
        EchoAttError: They could not be compared: no such model or bundle, another plan, another
            shape, a device that does not work.
    """
    _check_device(device)
    opened = Bundle.open(bundle)
    path, specification, own = opened.model, opened.specification, opened.specification.plan
    plan = own if plan is None else SharingPlan.of(plan, own.num_layers)
    if plan.sources != own.sources:
        raise PlanError(
            f"could not compare: {path} has the plan {list(own.sources)}, not"
            f" {list(plan.sources)}; leave the plan out, or export with it"
        )
    if own.head_orders and plan.head_orders != own.head_orders:
        raise PlanError(
            f"could not compare: {path} was exported with its followers' heads in another order"
            " than the plan's; leave the plan out, or export with it"
        )
    student = load_shared(
        model_dir,
        plan,
        dtype=graph_dtype(specification.dtype),
        trust_remote_code=trust_remote_code,
    )
    _check_same_model(student, specification, path)
    texts: Any = {"tokenizer_dir": Path(model_dir), "max_context": max_context}
    unrounded: UnroundedRun | None = None
    if specification.weight_dtype.bits is not None:
        unrounded = record_unrounded(student, specification, **texts)
        round_as_stored(student, opened)
    reference = record_reference(
        student, specification, unrounded=unrounded, device=device, **texts
    )
    del student
    gc.collect()
    return compare(reference, opened)


def assert_parity(
    model_dir: str | Path,
    bundle: str | Path,
    plan: SharingPlan | str | None = None,
    *,
    max_context: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Fail unless PyTorch and a bundle agree; for a test.

    Args:
        model_dir: As in `check_parity`, and so are the others.
        bundle: The bundle.
        plan: The sharing plan.
        max_context: The most tokens of the long text.
        device: Where the bundle runs.
        trust_remote_code: Run code that the checkpoint brings.

    Raises:
        ParityError: They differ.
        EchoAttError: They could not be compared.
    """
    check_parity(
        model_dir,
        bundle,
        plan,
        max_context=max_context,
        device=device,
        trust_remote_code=trust_remote_code,
    ).raise_on_mismatch()


def _check_device(device: str | None) -> None:
    """Refuse a device that does not work, before PyTorch computes what it is compared with."""
    if device not in (None, *DEVICES):
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cuda" and not has_cuda():
        # Says why, where it is the provider that does not load
        cuda_library()
        raise DeviceError(
            "there is no GPU that CUDA can use; leave the device out to compare on the CPU"
        )


def _check_same_model(
    student: EchoAttForCausalLM, specification: Specification, path: Path
) -> None:
    described = specification_fields(architecture_of(student.config.get_text_config()))
    differences = [
        f"{name} {getattr(specification, name)} instead of {value}"
        for name, value in described.items()
        if getattr(specification, name) != value
    ]
    if differences:
        raise CheckpointError(
            f"could not compare: {path} was made from another model ({'; '.join(differences)});"
            " give the directory that it was exported from"
        )
