"""What a comparison found, and what it may at most find."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from echoatt_exporter.errors import ParityError
from echoatt_exporter.parity.tolerance import Tolerance, dtype_name
from echoatt_runtime.contract import DTYPES, RoundingCost, Verification


@dataclass(frozen=True, slots=True)
class Difference:
    """One way of feeding the bundle, and how far it is from PyTorch.

    Several numbers are in units of the logits' *spread*: their standard deviation over the
    vocabulary. Softmax ignores what all logits have in common, so the spread is the scale on which
    a difference means something; the logits of one model span 0.1 and of another 30.

    Attributes:
        name: Of the case.
        rows: Positions whose logits were compared.
        max_abs_error: Largest logit difference; infinite if a logit is not a number.
        max_error: The same in units of the logits' spread.
        rms_error: Root mean square of the differences in units of the spread.
        mean_kl: Mean Kullback-Leibler divergence of the bundle's next-token distribution from
            PyTorch's, in nats.
        max_kl: The largest.
        top1_agreement: Fraction of positions with the same most likely token.
        first_diverging_token: The first position of a text at which the most likely next token
            differs; None if there is none.
        nan_count: The bundle's logits that are NaN or infinite.
    """

    name: str
    rows: int
    max_abs_error: float
    max_error: float
    rms_error: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    first_diverging_token: int | None
    nan_count: int


@dataclass(frozen=True, slots=True)
class Nearest:
    """A distance and its bound, in units of the logits' spread.

    Attributes:
        measure: What was measured, in words.
        position: Where in its text.
        found: The distance.
        allowed: Its bound.
    """

    measure: str
    position: int
    found: float
    allowed: float

    @property
    def excess(self) -> float:
        """The distance as a multiple of its bound."""
        return self.found / self.allowed


@dataclass(frozen=True, slots=True)
class CaseReport(Difference):
    """A case that the bundle is judged by.

    Attributes:
        allowed_abs_error: Logit difference that was allowed where `max_abs_error` was found.
        nearest: What came nearest to its bound, or is furthest beyond it.
    """

    allowed_abs_error: float
    nearest: Nearest

    @property
    def excess(self) -> float:
        """The largest ratio of a difference to what is allowed; up to 1 the case passes."""
        return self.nearest.excess

    @property
    def severity(self) -> tuple[bool, float]:
        """Orders cases: the larger, the worse."""
        return self.nan_count > 0, self.excess

    @property
    def passed(self) -> bool:
        """Whether all logits are numbers and within the tolerance."""
        return self.nan_count == 0 and self.excess <= 1

    @property
    def finding(self) -> str:
        """The number that is nearest to its tolerance, or beyond it, in words."""
        if self.nan_count:
            return f"{self.nan_count} logits are NaN or infinite"
        at = self.nearest
        return (
            f"the logits of token {at.position} differ by {at.found:.2g} of their spread"
            f" ({at.measure}), {at.allowed:.2g} allowed"
        )


@dataclass(frozen=True, slots=True)
class ParityReport:
    """A whole comparison.

    Attributes:
        provider: What ran the bundle: an execution provider, and what was changed for it.
        dtype: The bundle's.
        tolerance: What was allowed.
        typical: The yardstick at most positions, in units of the logits' spread.
        cases: By case, in the order in which they ran. A bundle with quantised weights is compared
            with PyTorch computing from the same rounded weights.
        unrounded: How far a bundle with quantised weights, run as it will be, is from the
            checkpoint's own weights: what quantisation costs, which nothing is judged by but that
            all logits are numbers. None for other bundles.
        first_diverging_layer: When a case failed, the first layer whose attention output differs;
            None when all passed, or when every layer's agrees.
        divergence: The same in words; empty when all passed.
    """

    provider: str
    dtype: str
    tolerance: Tolerance
    typical: float
    cases: tuple[CaseReport, ...]
    unrounded: Difference | None
    first_diverging_layer: int | None
    divergence: str

    @property
    def passed(self) -> bool:
        """Whether every case passed, and a quantised bundle gives numbers."""
        return all(case.passed for case in self.cases) and not self._nan_as_run

    @property
    def _nan_as_run(self) -> int:
        return 0 if self.unrounded is None else self.unrounded.nan_count

    @property
    def worst(self) -> CaseReport:
        """The case that is furthest beyond, or nearest to, its tolerance."""
        return max(self.cases, key=lambda case: case.severity)

    @property
    def method(self) -> str:
        """What was compared with what, and what was allowed, in words."""
        rounded = DTYPES[self.dtype].bits is not None
        weights = "the bundle's own rounded" if rounded else "the checkpoint's"
        return (
            f"against PyTorch with {weights} weights in {dtype_name(self.tolerance.exact)};"
            f" allowed: {self.tolerance.words}"
        )

    def raise_on_mismatch(self) -> None:
        """Raise unless every case passed.

        Raises:
            ParityError: Names the worst case, its number and tolerance, and the first layer that
                diverges.
        """
        if self.passed:
            return
        failed = sum(not case.passed for case in self.cases)
        if not failed:
            raise ParityError(
                f"the bundle computes {self._nan_as_run} logits that are NaN or infinite when it is"
                f" run as it is, though not from its weights in float32 ({self.provider}); export"
                " it in another dtype"
            )
        raise ParityError(
            f"bundle and PyTorch disagree in {failed} of {len(self.cases)} cases, most in"
            f" {self.worst.name!r}: {self.worst.finding} in {self.tolerance.name}"
            f" ({self.worst.excess:.2g} times the tolerance); {self.divergence} ({self.provider});"
            " look there, and see all cases with echoatt parity"
        )

    def verification(self) -> Verification:
        """What the manifest says of this comparison."""
        largest = max(self.cases, key=lambda case: case.max_abs_error)
        cost: RoundingCost | None = None
        if self.unrounded is not None:
            cost = RoundingCost(
                positions=self.unrounded.rows,
                mean_kl=self.unrounded.mean_kl,
                top1_agreement=self.unrounded.top1_agreement,
                rms_error=self.unrounded.rms_error,
            )
        return Verification(
            provider=self.provider,
            passed=self.passed,
            method=self.method,
            tolerance=largest.allowed_abs_error,
            max_abs_error=largest.max_abs_error,
            cases=len(self.cases),
            rounding_cost=cost,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON; numbers that are infinite are null."""
        limits = self.tolerance
        return {
            "passed": self.passed,
            "provider": self.provider,
            "dtype": self.dtype,
            "method": self.method,
            "tolerance": {
                "name": limits.name,
                "exact": dtype_name(limits.exact),
                "rounded": dtype_name(limits.rounded),
                "largest": limits.largest,
                "typical": limits.typical,
                "floor": limits.floor,
                "yardstick": self.typical,
            },
            "first_diverging_layer": self.first_diverging_layer,
            "divergence": self.divergence,
            "cases": [
                _finite(case) | {"excess": _number(case.excess), "passed": case.passed}
                for case in self.cases
            ],
            "unrounded": None if self.unrounded is None else _finite(self.unrounded),
        }


def _finite(record: Difference | Nearest) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        name: _finite(value) if isinstance(value, Nearest) else _number(value)
        for name, value in values.items()
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
