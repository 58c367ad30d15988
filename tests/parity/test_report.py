"""The numbers of a report against ones worked out by hand, and what it says of itself."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.wording import says

from echoatt_exporter.errors import ParityError
from echoatt_exporter.parity import (
    CaseReport,
    Difference,
    ParityReport,
    Tolerance,
    format_report,
)
from echoatt_exporter.parity.report import Nearest
from echoatt_exporter.parity.statistics import Statistics
from echoatt_exporter.parity.yardstick import Typical, Yardstick

TOLERANCE = Tolerance("fp32", torch.float64, torch.float32, largest=8, typical=4, floor=1e-7)


def _row(*probabilities: float) -> Any:
    return np.log(np.array(probabilities, np.float32))


def test_statistics() -> None:
    statistics = Statistics("case", spread=2.0)
    statistics.add(4, _row(0.5, 0.25, 0.25), _row(0.5, 0.25, 0.25))
    statistics.add(7, _row(0.5, 0.25, 0.25), _row(0.25, 0.5, 0.25))
    # A shift of all logits is a difference, though not one of distributions
    statistics.add(2, _row(0.5, 0.25, 0.25), _row(0.5, 0.25, 0.25) + np.float32(0.3))

    case = statistics.difference()

    ln2 = math.log(2)
    assert case.name == "case"
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


def _judge(*errors: float, yardsticks: tuple[float, ...], largest: float = math.inf) -> CaseReport:
    """Positions whose logits are all wrong by as much; the spread is 10."""
    statistics = Statistics("case", spread=10.0)
    for position, (error, yardstick) in enumerate(zip(errors, yardsticks, strict=True)):
        expected = _row(0.5, 0.25, 0.25)
        found = expected + np.float32(error)
        statistics.add(position, expected, found, (yardstick, largest))
    return statistics.judge(TOLERANCE)


def test_one_position_is_held_against_its_own_yardstick() -> None:
    right = _judge(0.1, 0.1, 70.0, yardsticks=(1.0, 1.0, 10.0))
    wrong = _judge(0.1, 0.1, 90.0, yardsticks=(1.0, 1.0, 10.0))

    assert right.passed
    assert right.nearest.position == 2
    assert right.excess == pytest.approx(70 / (8 * 10))
    assert not wrong.passed
    assert wrong.nearest == Nearest("root mean square", 2, pytest.approx(9.0), pytest.approx(8.0))


def test_the_middle_of_a_case_is_held_more_tightly() -> None:
    right = _judge(0.1, 0.1, 5.0, 0.1, yardsticks=(1.0,) * 4)
    wrong = _judge(5.0, 5.0, 5.0, 0.1, yardsticks=(1.0,) * 4)

    assert right.passed
    assert right.excess == pytest.approx(5 / 8)
    assert not wrong.passed
    assert wrong.nearest.measure == "in the middle of the case"
    assert wrong.excess == pytest.approx(5 / 4)


def test_a_single_logit_is_held_against_the_largest_of_the_yardstick() -> None:
    case = _judge(0.5, 0.1, 0.1, yardsticks=(1.0,) * 3, largest=0.05)

    assert not case.passed
    assert case.nearest.measure == "largest logit"
    assert case.excess == pytest.approx(0.5 / (8 * 0.05))
    assert case.allowed_abs_error == pytest.approx(0.4)


def _yardstick(*rms: float) -> Yardstick:
    values = np.array(rms)
    return Yardstick(values, 5 * values, np.stack([values, 2 * values]))


def test_a_yardstick_measures_distances_and_takes_the_larger_of_two() -> None:
    exact = np.array([[0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    found = np.array([[0, 2, 0, 0], [1, 1, np.inf, 1]], np.float32)
    contexts = np.zeros((1, 2, 3), np.float32)

    with np.errstate(invalid="ignore"):
        measured = Yardstick.between(exact, found, contexts, contexts + np.float32(0.5))

    # What overflows is no measure of what may be lost
    assert measured.rms.tolist() == [1, 0]
    assert measured.largest.tolist() == [2, 0]
    assert measured.contexts.tolist() == [[0.5, 0.5]]
    worse = _yardstick(1, 4).or_worse(_yardstick(3, 2))
    assert worse.rms.tolist() == [3, 4]
    assert worse.contexts.tolist() == [[3, 4], [6, 8]]


def test_a_few_positions_that_magnify_errors_leave_the_typical_one_alone() -> None:
    typical = Typical.of([_yardstick(1, 1, 1, 2), _yardstick(1, 1_000)])

    assert (typical.rms, typical.largest) == (1, 5)
    assert typical.contexts.tolist() == [1, 2]


def test_first_diverging_token_is_the_smallest_position_of_all_rows() -> None:
    statistics = Statistics("case", spread=1.0)
    for position in (9, 3, 5):
        statistics.add(position, _row(0.6, 0.4), _row(0.4, 0.6))

    assert statistics.difference().first_diverging_token == 3


def test_rows_without_numbers() -> None:
    statistics = Statistics("case", spread=1.0)
    statistics.add(0, _row(0.6, 0.4), _row(0.6, 0.4), (1.0, 1.0))
    statistics.add(1, _row(0.6, 0.4), np.array([np.nan, np.inf], np.float32), (1.0, 1.0))
    statistics.add(2, _row(0.6, 0.4), _row(0.6, 0.4), (1.0, 1.0))

    case = statistics.judge(TOLERANCE)

    assert case.nan_count == 2
    assert case.max_abs_error == math.inf
    assert case.top1_agreement == pytest.approx(2 / 3)
    assert case.first_diverging_token == 1
    assert not case.passed


def _case(name: str, found: float, nan_count: int = 0) -> CaseReport:
    return CaseReport(
        name=name,
        rows=8,
        max_abs_error=found * 3,
        max_error=found,
        rms_error=found / 4,
        mean_kl=1e-9,
        max_kl=1e-8,
        top1_agreement=1.0,
        first_diverging_token=None,
        nan_count=nan_count,
        allowed_abs_error=0.3,
        nearest=Nearest("largest logit", 17, found, 0.1),
    )


def _report(*cases: CaseReport, unrounded: Difference | None = None) -> ParityReport:
    return ParityReport(
        provider="SomeProvider",
        dtype="fp32" if unrounded is None else "int4",
        tolerance=TOLERANCE,
        typical=2e-6,
        cases=cases,
        unrounded=unrounded,
        first_diverging_layer=None if all(case.passed for case in cases) else 3,
        divergence="first in layer 3's attention output",
    )


def _unrounded(nan_count: int = 0) -> Difference:
    return Difference(
        "prompts, unrounded weights", 76, 16.5, 4.8, 0.9, 0.36, 3.0, 0.6, 2, nan_count
    )


@pytest.mark.parametrize(
    ("case", "passed"),
    [
        (_case("at the limit", 0.1), True),
        (_case("beyond", 0.101), False),
        (_case("no number", 0.0, nan_count=1), False),
    ],
    ids=lambda value: value.name if isinstance(value, CaseReport) else "",
)
def test_passing(case: CaseReport, passed: bool) -> None:
    report = _report(_case("good", 0.0), case)

    assert case.passed is passed
    assert report.passed is passed
    assert report.worst is case


def test_a_failure_names_case_number_tolerance_and_layer() -> None:
    report = _report(_case("prefill", 0.05), _case("decode", 0.4), _case("ragged", 0.2))

    with pytest.raises(ParityError) as caught:
        report.raise_on_mismatch()

    assert str(caught.value) == (
        "bundle and PyTorch disagree in 2 of 3 cases, most in 'decode': the logits of token 17"
        " differ by 0.4 of their spread (largest logit), 0.1 allowed in fp32 (4 times the"
        " tolerance); first in layer 3's attention output (SomeProvider); look there, and see all"
        " cases with echoatt parity"
    )


def test_what_rounding_weights_costs_is_told_and_not_judged() -> None:
    report = _report(_case("prefill", 0.05), unrounded=_unrounded())

    report.raise_on_mismatch()
    cost = report.verification().rounding_cost
    data = report.to_dict()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_report(report))

    assert cost is not None
    assert (cost.positions, cost.mean_kl, cost.top1_agreement) == (76, 0.36, 0.6)
    assert "the bundle's own rounded weights in float64" in report.verification().method
    assert data["unrounded"]["mean_kl"] == 0.36
    assert "passed" not in data["unrounded"]
    assert says(console.export_text(), "not judged")


def test_a_quantised_bundle_that_gives_no_numbers_as_it_is_run_fails() -> None:
    report = _report(_case("prefill", 0.05), unrounded=_unrounded(nan_count=5))

    assert not report.passed
    with pytest.raises(ParityError, match="5 logits that are NaN or infinite when it is run as it"):
        report.raise_on_mismatch()


def test_verification_is_of_the_largest_difference() -> None:
    verification = _report(_case("prefill", 0.01), _case("decode", 0.05)).verification()

    assert verification.provider == "SomeProvider"
    assert verification.passed
    assert verification.cases == 2
    assert verification.max_abs_error == pytest.approx(0.15)
    assert verification.tolerance == pytest.approx(0.3)
    assert verification.rounding_cost is None
    assert verification.method == (
        "against PyTorch with the checkpoint's weights in float64; allowed: 8 times what PyTorch"
        " loses in float32 at a position, or at most positions if that is more, and 4 times in the"
        " middle of a case"
    )


def test_json_and_table_state_tolerances_and_every_case() -> None:
    report = _report(_case("prefill", 0.05), _case("decode", math.inf, nan_count=4))

    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_report(report))
    text = console.export_text()

    assert data["tolerance"] == {
        "name": "fp32",
        "exact": "float64",
        "rounded": "float32",
        "largest": 8,
        "typical": 4,
        "floor": 1e-7,
        "yardstick": 2e-6,
    }
    assert [(case["name"], case["passed"]) for case in data["cases"]] == [
        ("prefill", True),
        ("decode", False),
    ]
    assert data["cases"][0]["excess"] == pytest.approx(0.5)
    assert data["cases"][1]["max_error"] is None
    assert data["first_diverging_layer"] == 3
    assert data["unrounded"] is None
    for expected in ("SomeProvider", "prefill", "FAIL", "layer 3", "8 times what PyTorch", "2e-06"):
        assert says(text, expected)
