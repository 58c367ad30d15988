"""Runs a bundle on the cases of a reference and compares its logits.

Shapes: L layers, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.parity.cases import AnyCase
from echoatt_exporter.parity.feeding import Texts, feed
from echoatt_exporter.parity.instrumented import describe, open_bundle
from echoatt_exporter.parity.reference import ReferenceRun
from echoatt_exporter.parity.report import CaseReport, Difference, ParityReport
from echoatt_exporter.parity.statistics import Statistics
from echoatt_exporter.parity.tolerance import LARGEST_TO_RMS
from echoatt_exporter.parity.yardstick import Typical
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor import Executor
from echoatt_runtime.measures import spread

_ROUNDED = ", rounded weights"
_UNROUNDED = ", unrounded weights"

# Everything that a comparison takes for granted; other fields may differ
_SAME = (
    "family", "plan", "layer_kinds", "sliding_window", "query_heads", "kv_heads", "head_dims",
    "vocab_size", "dtype",
)  # fmt: skip


def compare(reference: ReferenceRun, bundle: Bundle) -> ParityReport:
    """Run the bundle on every case that PyTorch ran.

    The bundle runs through the EchoAtt runtime on the reference's device. On the CPU, which has no
    kernels for it, a bf16 bundle is computed in float32 from its bf16 weights, with a tolerance of
    its own.

    A bundle with quantised weights is judged by what it computes from them in float32, where the
    only difference is the graph's. As it is run otherwise, kernels round activations too, and it is
    another model than the checkpoint: how far from it is told, and not judged.

    Args:
        reference: PyTorch's side.
        bundle: The bundle.

    Raises:
        CheckpointError: The bundle was made from another kind of model, or with another plan.
        BundleError: The bundle is damaged.
        DeviceError: It cannot be run.
    """
    specification = bundle.specification
    _check_same(reference.specification, specification, bundle.model)
    device = reference.device
    unrounded = _compare_unrounded(reference, bundle, device)
    typical = Typical.of(reference.yardsticks)
    executor = open_bundle(bundle, device, exact=_is_rounded(reference))
    cases = tuple(_compare_case(executor, case, reference, typical) for case in reference.cases)
    del executor
    layer: int | None = None
    divergence = ""
    if not all(case.passed for case in cases):
        layer, divergence = _locate(reference, cases, typical, bundle, device)
    return ParityReport(
        provider=describe(specification, device),
        dtype=specification.dtype,
        tolerance=reference.tolerance,
        typical=typical.rms / _spread(range(len(reference.texts)), reference.texts),
        cases=cases,
        unrounded=unrounded,
        first_diverging_layer=layer,
        divergence=divergence,
    )


def _check_same(expected: Specification, found: Specification, path: Path) -> None:
    differences = [
        f"{name} {getattr(found, name)} instead of {getattr(expected, name)}"
        for name in _SAME
        if getattr(found, name) != getattr(expected, name)
    ]
    if differences:
        raise CheckpointError(
            f"could not compare: {path} was made from another model ({'; '.join(differences)});"
            " give the model directory and the plan that it was exported from"
        )


def _compare_unrounded(reference: ReferenceRun, bundle: Bundle, device: str) -> Difference | None:
    if reference.unrounded is None:
        return None
    case, texts = reference.unrounded.case, reference.unrounded.texts
    statistics = Statistics(case.name + _UNROUNDED, _spread(case.texts, texts))
    for row in feed(open_bundle(bundle, device), case, texts):
        text = texts[row.text]
        statistics.add(int(text.positions[row.kept]), text.logits[row.kept], row.logits)
    return statistics.difference()


def _compare_case(
    executor: Executor, case: AnyCase, reference: ReferenceRun, typical: Typical
) -> CaseReport:
    scale = _spread(case.texts, reference.texts)
    floor = reference.tolerance.floor * scale
    remark = _ROUNDED if _is_rounded(reference) else ""
    statistics = Statistics(case.name + remark, scale)
    for row in feed(executor, case, reference.texts):
        text, yardstick = reference.texts[row.text], reference.yardsticks[row.text]
        yardsticks = (
            max(float(yardstick.rms[row.kept]), typical.rms, floor),
            max(float(yardstick.largest[row.kept]), typical.largest, LARGEST_TO_RMS * floor),
        )
        position = int(text.positions[row.kept])
        statistics.add(position, text.logits[row.kept], row.logits, yardsticks)
    return statistics.judge(reference.tolerance)


def _is_rounded(reference: ReferenceRun) -> bool:
    return reference.specification.weight_dtype.bits is not None


def _spread(indices: Sequence[int], texts: Texts) -> float:
    # A model whose logits are all equal has no scale of its own
    return spread([texts[index].logits for index in indices]) or 1.0


def _locate(
    reference: ReferenceRun,
    reports: Sequence[CaseReport],
    typical: Typical,
    bundle: Bundle,
    device: str,
) -> tuple[int | None, str]:
    """Find the first layer whose attention output differs, in any case that failed."""
    executor = open_bundle(bundle, device, exact=_is_rounded(reference), contexts=True)
    layers = [
        layer
        for report, case in zip(reports, reference.cases, strict=True)
        if not report.passed
        for layer in _diverging(executor, case, reference, typical)
    ]
    if layers:
        return min(layers), f"first in layer {min(layers)}'s attention output"
    return None, "after the last layer's attention"


def _diverging(
    executor: Executor, case: AnyCase, reference: ReferenceRun, typical: Typical
) -> list[int]:
    """The layers whose attention output differs by more than PyTorch's own, times the factor."""
    texts, tolerance = reference.texts, reference.tolerance
    scales_L = np.sqrt(
        np.mean([np.square(texts[i].contexts).mean(axis=(1, 2)) for i in case.texts], axis=0)
    )
    floor_L = LARGEST_TO_RMS * tolerance.floor * np.where(scales_L > 0, scales_L, 1.0)
    least_L = np.maximum(floor_L, typical.contexts)
    largest_L = np.zeros(executor.specification.num_layers)
    for row in feed(executor, case, texts, contexts=True):
        if row.contexts:
            expected_LC = texts[row.text].contexts[:, row.kept]
            difference_L = np.abs(np.stack(row.contexts) - expected_LC).max(axis=1)
            own_L = reference.yardsticks[row.text].contexts[:, row.kept]
            # A NaN is larger than any limit
            ratio_L = np.nan_to_num(difference_L / np.maximum(own_L, least_L), nan=np.inf)
            largest_L = np.fmax(largest_L, ratio_L)
    found: list[int] = np.flatnonzero(largest_L > tolerance.largest).tolist()
    return found
