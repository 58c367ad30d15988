"""Medians with their spread, and ratios of samples that were taken in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it.

    Attributes:
        median: Half of the samples lie on either side.
        low: The first quartile.
        high: The third quartile.
        samples: How many there were.
    """

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample; quartiles are interpolated, ends included."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def paired_ratio(upper: Sequence[float], lower: Sequence[float]) -> Spread:
    """The spread of `upper / lower`, sample by sample.

    Samples of one round were taken within seconds of each other, so whatever slowed the machine
    slowed both, and their ratio moves less than either.

    Args:
        upper: One sample a round.
        lower: The same rounds.
    """
    return Spread.of([above / below for above, below in zip(upper, lower, strict=True)])
