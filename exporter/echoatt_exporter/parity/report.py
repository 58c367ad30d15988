"""What a comparison found, and what it may at most find."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

from echoatt_exporter.errors import ParityError
from echoatt_runtime.contract import Verification


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a bundle's logits may be from PyTorch's.

    Both numbers are in units of the logits' *spread*: their standard deviation over the vocabulary.
    Softmax ignores what all logits have in common, so the spread is the scale on which a difference
    means something; the logits of one model span 0.1 and of another 30, and no absolute number
    suits both.

    Attributes:
        name: The arithmetic that the numbers are for.
        max_error: Largest difference of any logit.
        rms_error: Root mean square of all differences of a case.
        basis: Where the numbers come from, in words.
    """

    name: str
    max_error: float
    rms_error: float
    basis: str


# Measured on tiny random models with sharp attention, which amplify errors more than trained ones
# do, and on trained models of 5 and 12 layers. Correct float32 bundles differ by up to 8e-6 (rms
# 9e-7), float16 ones by up to 1.6e-2 (rms 2.3e-3). The smallest fault that the tests plant, a
# value projection 0.1 % too large, makes 3e-3 in float32; swapped heads, a wrong mask row or a
# wrong source make 1 and more. bfloat16 rounds at 2^-8 where float16 does at 2^-11: its numbers
# are float16's times 8. Computed in float32, a bfloat16 graph still has its scales and caps
# rounded to bfloat16, which makes up to 4e-2 (rms 6e-3).
TOLERANCES: Final = {
    name: Tolerance(name, max_error, rms_error, basis="fixed")
    for name, max_error, rms_error in (
        ("fp32", 2e-4, 4e-5),
        ("fp16", 1e-1, 1e-2),
        ("bf16", 8e-1, 8e-2),
        ("bf16 computed in float32", 1e-1, 1e-2),
    )
}

# Quantised weights are another model, and how far it is from the first depends on the model: rms
# 0.006 to 0.03 at 8 bits and 0.06 to 0.5 at 4 bits on those above. PyTorch says how far, by
# computing from the same rounded weights; of that, correct bundles showed 1.3 to 2.4 times at 8
# bits, where the kernel's rounding of activations weighs as much, and 0.6 to 1.8 times at 4 bits.
# This lets small faults pass. They are caught by the second comparison, with rounded weights on
# both sides and float32's tolerance.
_ROUNDING_FACTORS: Final = {"int8": 4, "int4": 3}

# Single logits scatter: the largest difference was 3 to 11 times the root mean square
_MAX_TO_RMS: Final = 12


def rounding_tolerance(dtype: str, rms_error: float) -> Tolerance:
    """The tolerance of a bundle with quantised weights.

    Args:
        dtype: `int8` or `int4`.
        rms_error: What rounding the weights alone does to PyTorch's logits, in units of the spread.
    """
    factor = _ROUNDING_FACTORS[dtype]
    allowed = factor * rms_error
    basis = f"{factor} times what rounding the weights alone does to PyTorch's logits"
    return Tolerance(dtype, _MAX_TO_RMS * allowed, allowed, basis)


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One way of feeding the bundle, compared with PyTorch.

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
            differs; None if there is none. In a decoding case the tokens up to there are the
            bundle's own greedy choice, so this is where free-running greedy text would part.
        nan_count: The bundle's logits that are NaN or infinite.
        tolerance: What was allowed.
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
    tolerance: Tolerance

    @property
    def excess(self) -> float:
        """The largest ratio of a difference to its tolerance; up to 1 the case passes."""
        return max(
            self.max_error / self.tolerance.max_error, self.rms_error / self.tolerance.rms_error
        )

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
        limits = self.tolerance
        if self.max_error / limits.max_error >= self.rms_error / limits.rms_error:
            return f"a logit differs by {self.max_error:.2g} of the logits' spread" + (
                f" ({self.max_abs_error:.2g}), {limits.max_error:.2g} allowed in {limits.name}"
            )
        return f"the logits differ by {self.rms_error:.2g} of their spread in the mean" + (
            f" (root mean square), {limits.rms_error:.2g} allowed in {limits.name}"
        )


@dataclass(frozen=True, slots=True)
class ParityReport:
    """A whole comparison.

    Attributes:
        provider: What ran the bundle: an execution provider, and what was changed for it.
        dtype: The bundle's.
        cases: By case, in the order in which they ran.
        first_diverging_layer: When a case failed, the first layer whose attention output differs;
            None when all passed, or when every layer's agrees.
        divergence: The same in words; empty when all passed.
    """

    provider: str
    dtype: str
    cases: tuple[CaseReport, ...]
    first_diverging_layer: int | None
    divergence: str

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(case.passed for case in self.cases)

    @property
    def worst(self) -> CaseReport:
        """The case that is furthest beyond, or nearest to, its tolerance."""
        return max(self.cases, key=lambda case: case.severity)

    @property
    def tolerances(self) -> tuple[Tolerance, ...]:
        """The tolerances that were used."""
        return tuple(dict.fromkeys(case.tolerance for case in self.cases))

    def raise_on_mismatch(self) -> None:
        """Raise unless every case passed.

        Raises:
            ParityError: Names the worst case, its number and tolerance, and the first layer that
                diverges.
        """
        if self.passed:
            return
        failed = sum(not case.passed for case in self.cases)
        raise ParityError(
            f"bundle and PyTorch disagree in {failed} of {len(self.cases)} cases, most in"
            f" {self.worst.name!r}: {self.worst.finding}; {self.divergence} ({self.provider});"
            " look there, and see all cases with echoatt parity"
        )

    def verification(self) -> Verification:
        """What the manifest says of this comparison."""
        worst = self.worst
        # The spread is what turns one of the two numbers into the other
        spread = worst.max_abs_error / worst.max_error if worst.max_error else 1.0
        return Verification(
            provider=self.provider,
            passed=self.passed,
            tolerance=worst.tolerance.max_error * spread,
            max_abs_error=worst.max_abs_error,
            cases=len(self.cases),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON; numbers that are infinite are null."""
        return {
            "passed": self.passed,
            "provider": self.provider,
            "dtype": self.dtype,
            "tolerances": [dataclasses.asdict(tolerance) for tolerance in self.tolerances],
            "first_diverging_layer": self.first_diverging_layer,
            "divergence": self.divergence,
            "cases": [_case_dict(case) for case in self.cases],
        }


def _case_dict(case: CaseReport) -> dict[str, Any]:
    data = dataclasses.asdict(case) | {"tolerance": case.tolerance.name, "passed": case.passed}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in data.items()
    }
