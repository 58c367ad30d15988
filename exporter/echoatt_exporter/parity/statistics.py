"""Collects a case's differences, position by position, so that no second set of logits is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from echoatt_exporter.parity.report import CaseReport, Difference, Nearest
from echoatt_exporter.parity.tolerance import Tolerance
from echoatt_exporter.parity.yardstick import Floats, distances
from echoatt_runtime.measures import kl_divergence, same_top_token


@dataclass(frozen=True, slots=True)
class _Position:
    """One position's distances, and its yardsticks for them."""

    position: int
    rms: float
    largest: float
    yardstick_rms: float
    yardstick_largest: float


class Statistics:
    """The differences of one case, so far.

    Args:
        name: The case's.
        spread: Standard deviation of its logits over the vocabulary.
    """

    def __init__(self, name: str, spread: float) -> None:
        self._name = name
        self._spread = spread
        self._agreeing = self._nans = 0
        self._kls: list[float] = []
        self._positions: list[_Position] = []
        self._first: int | None = None

    def add(
        self,
        position: int,
        expected_V: Floats,
        found_V: Floats,
        yardsticks: tuple[float, float] = (math.inf, math.inf),
    ) -> None:
        """Take one position's logits.

        Args:
            position: In its text.
            expected_V: PyTorch's, all finite.
            found_V: The bundle's.
            yardsticks: For the root mean square of the differences and for the largest; infinite
                where nothing is judged.
        """
        if nans := int(np.count_nonzero(~np.isfinite(found_V))):
            # Nothing but their count can be said of logits that are not numbers
            self._nans += nans
            self._positions.append(_Position(position, math.inf, math.inf, *yardsticks))
            self._diverges_at(position)
            return
        self._positions.append(_Position(position, *distances(expected_V, found_V), *yardsticks))
        rows = expected_V[None], found_V[None]
        self._kls.append(kl_divergence(*rows).item())
        if same_top_token(*rows).item():
            self._agreeing += 1
        else:
            self._diverges_at(position)

    def _diverges_at(self, position: int) -> None:
        self._first = position if self._first is None else min(position, self._first)

    def difference(self) -> Difference:
        """What was found in all positions so far."""
        known = not self._nans
        largest = max(each.largest for each in self._positions)
        square = np.mean(np.square([each.rms for each in self._positions]))
        return Difference(
            name=self._name,
            rows=len(self._positions),
            max_abs_error=largest,
            max_error=largest / self._spread,
            rms_error=math.sqrt(square) / self._spread,
            mean_kl=float(np.mean(self._kls)) if known else math.inf,
            max_kl=max(self._kls) if known else math.inf,
            top1_agreement=self._agreeing / len(self._positions),
            first_diverging_token=self._first,
            nan_count=self._nans,
        )

    def judge(self, tolerance: Tolerance) -> CaseReport:
        """The same, and what of it came nearest to what is allowed."""
        where = max(self._positions, key=lambda each: each.largest)
        ratios = [each.rms / each.yardstick_rms for each in self._positions]
        # The middle as a distance: that of the position in the middle
        middle = sorted(zip(ratios, self._positions, strict=True), key=lambda pair: pair[0])
        _, typical = middle[len(middle) // 2]
        candidates = [
            Nearest(
                "in the middle of the case",
                typical.position,
                typical.rms / self._spread,
                tolerance.typical * typical.yardstick_rms / self._spread,
            )
        ]
        for each in self._positions:
            for measure, found, yardstick in (
                ("root mean square", each.rms, each.yardstick_rms),
                ("largest logit", each.largest, each.yardstick_largest),
            ):
                allowed = tolerance.largest * yardstick / self._spread
                candidates.append(Nearest(measure, each.position, found / self._spread, allowed))
        return CaseReport(
            **dataclasses.asdict(self.difference()),
            allowed_abs_error=tolerance.largest * where.yardstick_largest,
            nearest=max(candidates, key=lambda nearest: nearest.excess),
        )
