"""The numbers of a report against ones worked out by hand, and what it says of itself."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.wording import says

from echoatt_exporter.errors import ParityError
from echoatt_exporter.parity import CaseReport, ParityReport, Tolerance, format_report
from echoatt_exporter.parity.compare import Statistics

TOLERANCE = Tolerance("fp32", max_error=0.1, rms_error=0.05, basis="fixed")


def _row(*probabilities: float) -> Any:
    return np.log(np.array(probabilities, np.float32))


def test_statistics() -> None:
    statistics = Statistics(spread=2.0)
    statistics.add(4, _row(0.5, 0.25, 0.25), _row(0.5, 0.25, 0.25))
    statistics.add(7, _row(0.5, 0.25, 0.25), _row(0.25, 0.5, 0.25))
    # A shift of all logits is a difference, though not one of distributions
    statistics.add(2, _row(0.5, 0.25, 0.25), _row(0.5, 0.25, 0.25) + np.float32(0.3))

    case = statistics.report("case", TOLERANCE)

    ln2 = math.log(2)
    assert case.rows == 3
    assert case.max_abs_error == pytest.approx(ln2)
    assert case.max_error == pytest.approx(ln2 / 2)
    assert case.rms_error == pytest.approx(math.sqrt((2 / 3 * ln2**2 + 0.09) / 3) / 2)
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5)
    assert case.max_kl == pytest.approx(0.25 * ln2)
    assert case.mean_kl == pytest.approx(0.25 * ln2 / 3, abs=1e-7)
    assert case.top1_agreement == pytest.approx(2 / 3)
    assert case.first_diverging_token == 7
    assert case.nan_count == 0
    assert not case.passed


def test_first_diverging_token_is_the_smallest_position_of_all_rows() -> None:
    statistics = Statistics(spread=1.0)
    for position in (9, 3, 5):
        statistics.add(position, _row(0.6, 0.4), _row(0.4, 0.6))

    assert statistics.report("case", TOLERANCE).first_diverging_token == 3


def test_rows_without_numbers() -> None:
    statistics = Statistics(spread=1.0)
    statistics.add(0, _row(0.6, 0.4), _row(0.6, 0.4))
    statistics.add(1, _row(0.6, 0.4), np.array([np.nan, np.inf], np.float32))
    statistics.add(2, _row(0.6, 0.4), _row(0.6, 0.4))

    case = statistics.report("case", TOLERANCE)

    assert case.nan_count == 2
    assert case.max_abs_error == math.inf
    assert case.top1_agreement == pytest.approx(2 / 3)
    assert case.first_diverging_token == 1
    assert not case.passed


def _case(name: str, max_error: float, rms_error: float = 0.0, nan_count: int = 0) -> CaseReport:
    return CaseReport(
        name=name,
        rows=8,
        max_abs_error=max_error * 3,
        max_error=max_error,
        rms_error=rms_error,
        mean_kl=1e-9,
        max_kl=1e-8,
        top1_agreement=1.0,
        first_diverging_token=None,
        nan_count=nan_count,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize(
    ("case", "passed"),
    [
        (_case("at the limit", 0.1, 0.05), True),
        (_case("one logit", 0.101), False),
        (_case("all a little", 0.06, 0.051), False),
        (_case("no number", 0.0, nan_count=1), False),
    ],
    ids=lambda value: value.name if isinstance(value, CaseReport) else "",
)
def test_passing(case: CaseReport, passed: bool) -> None:
    report = ParityReport("CPUExecutionProvider", "fp32", (_case("good", 0.0), case), None, "")

    assert case.passed is passed
    assert report.passed is passed
    assert report.worst is case


def test_a_failure_names_case_number_tolerance_and_layer() -> None:
    cases = (_case("prefill", 0.05), _case("decode", 0.4), _case("ragged", 0.2))
    report = ParityReport("SomeProvider", "fp32", cases, 3, "first in layer 3's attention output")

    with pytest.raises(ParityError) as caught:
        report.raise_on_mismatch()

    assert str(caught.value) == (
        "bundle and PyTorch disagree in 2 of 3 cases, most in 'decode': a logit differs by 0.4 of"
        " the logits' spread (1.2), 0.1 allowed in fp32; first in layer 3's attention output"
        " (SomeProvider); look there, and see all cases with echoatt parity"
    )


def test_verification_is_of_the_case_nearest_to_its_tolerance() -> None:
    report = ParityReport(
        "SomeProvider", "fp32", (_case("prefill", 0.01), _case("decode", 0.05)), None, ""
    )

    verification = report.verification()

    assert verification.provider == "SomeProvider"
    assert verification.passed
    assert verification.cases == 2
    assert verification.max_abs_error == pytest.approx(0.15)
    assert verification.tolerance == pytest.approx(0.3)


def test_json_and_table_state_tolerances_and_every_case() -> None:
    cases = (_case("prefill", 0.05), _case("decode", math.inf, math.inf, nan_count=4))
    report = ParityReport("SomeProvider", "fp32", cases, 3, "first in layer 3's attention output")

    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_report(report))
    text = console.export_text()

    assert data["tolerances"] == [
        {"name": "fp32", "max_error": 0.1, "rms_error": 0.05, "basis": "fixed"}
    ]
    assert [(case["name"], case["passed"]) for case in data["cases"]] == [
        ("prefill", True),
        ("decode", False),
    ]
    assert data["cases"][1]["max_error"] is None
    assert data["first_diverging_layer"] == 3
    for expected in ("SomeProvider", "prefill", "FAIL", "layer 3", "max |Δ| 0.1 and rms Δ 0.05"):
        assert says(text, expected)
