"""Runs a bundle on the cases of a reference and compares its logits.

Shapes: V vocabulary, L layers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.parity.cases import AnyCase
from echoatt_exporter.parity.feeding import Texts, feed
from echoatt_exporter.parity.instrumented import (
    choose_device,
    describe,
    needs_float32,
    open_bundle,
)
from echoatt_exporter.parity.reference import Floats, ReferenceRun
from echoatt_exporter.parity.report import (
    TOLERANCES,
    CaseReport,
    ParityReport,
    Tolerance,
    rounding_tolerance,
)
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor import Executor
from echoatt_runtime.measures import kl_divergence, same_top_token, spread

_ROUNDED = ", rounded weights"

# Everything that a comparison takes for granted; other fields may differ
_SAME = (
    "family", "plan", "layer_kinds", "sliding_window", "query_heads", "kv_heads", "head_dims",
    "vocab_size", "dtype",
)  # fmt: skip


def compare(reference: ReferenceRun, bundle: Bundle) -> ParityReport:
    """Run the bundle on every case that PyTorch ran.

    The bundle runs through the EchoAtt runtime on the device it was exported for, or on the CPU
    where there is no GPU. A bf16 bundle, for which the CPU has no kernels, is then computed in
    float32 from its bf16 weights, with a tolerance of its own.

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
    device = choose_device(specification)
    tolerance = _tolerance(reference, specification, device)
    executor = open_bundle(bundle, device)
    plain = [_compare_case(executor, case, reference.texts, tolerance) for case in reference.cases]
    del executor
    rounded = _compare_rounded(reference, bundle, device)
    cases = (*plain, *rounded)
    layer: int | None = None
    divergence = ""
    if not all(case.passed for case in cases):
        layer, divergence = _locate(reference, plain, rounded, bundle, device)
    return ParityReport(
        describe(specification, device), specification.dtype, cases, layer, divergence
    )


def _tolerance(reference: ReferenceRun, specification: Specification, device: str) -> Tolerance:
    if not reference.rounded_cases:
        in_float32 = " computed in float32" if needs_float32(specification, device) else ""
        return TOLERANCES[specification.dtype + in_float32]
    case = reference.rounded_cases[0]
    statistics = Statistics(_spread(case, reference.texts))
    for index in case.texts:
        true, rounded = reference.texts[index], reference.rounded_texts[index]
        # The rounded text is the true one's beginning
        for position, expected_V, found_V in zip(
            rounded.positions, true.logits, rounded.logits, strict=False
        ):
            statistics.add(int(position), expected_V, found_V)
    return rounding_tolerance(specification.dtype, statistics.rms_error)


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


def _compare_rounded(reference: ReferenceRun, bundle: Bundle, device: str) -> list[CaseReport]:
    """Cases with rounded weights on both sides, where the only difference is the graph's."""
    if not reference.rounded_cases:
        return []
    executor = open_bundle(bundle, device, exact=True)
    return [
        _compare_case(executor, case, reference.rounded_texts, TOLERANCES["fp32"], _ROUNDED)
        for case in reference.rounded_cases
    ]


def _compare_case(
    executor: Executor, case: AnyCase, texts: Texts, tolerance: Tolerance, remark: str = ""
) -> CaseReport:
    statistics = Statistics(_spread(case, texts))
    for row in feed(executor, case, texts):
        text = texts[row.text]
        statistics.add(int(text.positions[row.kept]), text.logits[row.kept], row.logits)
    return statistics.report(case.name + remark, tolerance)


def _spread(case: AnyCase, texts: Texts) -> float:
    # A model whose logits are all equal has no scale of its own
    return spread([texts[index].logits for index in case.texts]) or 1.0


class Statistics:
    """Collects a case's differences, row by row, so that no second set of logits is kept."""

    def __init__(self, spread: float) -> None:
        self._spread = spread
        self._rows = self._agreeing = self._nans = 0
        self._max_abs = self._square_sum = 0.0
        self._kls: list[float] = []
        self._first: int | None = None

    def add(self, position: int, expected_V: Floats, found_V: Floats) -> None:
        """Take one position's logits.

        Args:
            position: In its text.
            expected_V: PyTorch's, all finite.
            found_V: The bundle's.
        """
        self._rows += 1
        if nans := int(np.count_nonzero(~np.isfinite(found_V))):
            # Nothing but their count can be said of logits that are not numbers
            self._nans += nans
            self._diverges_at(position)
            return
        expected, found = expected_V.astype(np.float64), found_V.astype(np.float64)
        difference = found - expected
        self._max_abs = max(self._max_abs, float(np.abs(difference).max()))
        self._square_sum += float(np.mean(difference**2))
        rows = expected_V[None], found_V[None]
        self._kls.append(kl_divergence(*rows).item())
        if same_top_token(*rows).item():
            self._agreeing += 1
        else:
            self._diverges_at(position)

    def _diverges_at(self, position: int) -> None:
        self._first = position if self._first is None else min(position, self._first)

    @property
    def rms_error(self) -> float:
        """Root mean square of all differences, in units of the spread."""
        return math.sqrt(self._square_sum / self._rows) / self._spread

    def report(self, name: str, tolerance: Tolerance) -> CaseReport:
        """What was found in all positions so far."""
        known = not self._nans
        return CaseReport(
            name=name,
            rows=self._rows,
            max_abs_error=self._max_abs if known else math.inf,
            max_error=self._max_abs / self._spread if known else math.inf,
            rms_error=self.rms_error if known else math.inf,
            mean_kl=float(np.mean(self._kls)) if known else math.inf,
            max_kl=max(self._kls) if known else math.inf,
            top1_agreement=self._agreeing / self._rows,
            first_diverging_token=self._first,
            nan_count=self._nans,
            tolerance=tolerance,
        )


def _locate(
    reference: ReferenceRun,
    plain: list[CaseReport],
    rounded: list[CaseReport],
    bundle: Bundle,
    device: str,
) -> tuple[int | None, str]:
    """Find the first layer whose attention output differs, in any case that failed."""
    reports, cases = plain, reference.cases
    texts: Texts = reference.texts
    if reference.rounded_cases:
        if all(report.passed for report in rounded):
            return None, "the graph computes what its rounded weights say, so it is their rounding"
        # The plain cases of rounded weights differ in every layer, and rightly so
        reports, cases, texts = rounded, reference.rounded_cases, reference.rounded_texts
    executor = open_bundle(bundle, device, exact=bool(rounded), contexts=True)
    layers = [
        layer
        for report, case in zip(reports, cases, strict=True)
        if not report.passed
        for layer in _diverging(executor, case, texts, report.tolerance.max_error)
    ]
    if layers:
        return min(layers), f"first in layer {min(layers)}'s attention output"
    return None, "after the last layer's attention"


def _diverging(executor: Executor, case: AnyCase, texts: Texts, limit: float) -> list[int]:
    """The layers whose attention output differs by more than `limit` of its own scale."""
    largest = np.zeros(executor.specification.num_layers)
    for row in feed(executor, case, texts, contexts=True):
        if row.contexts:
            expected = texts[row.text].contexts[:, row.kept]
            difference = np.abs(np.stack(row.contexts) - expected).max(axis=1)
            # A NaN is larger than any limit
            largest = np.fmax(largest, np.nan_to_num(difference, nan=np.inf))
    scales = np.sqrt(
        np.mean([np.square(texts[i].contexts).mean(axis=(1, 2)) for i in case.texts], axis=0)
    )
    found: list[int] = np.flatnonzero(largest > limit * np.where(scales > 0, scales, 1.0)).tolist()
    return found
