"""What an arithmetic itself loses: the yardstick that a bundle is held against.

Shapes: L layers, p positions kept, V vocabulary, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Distances of PyTorch's results, computed in one precision, from those in a wider one.

    Attributes:
        rms: Float64 [p], root mean square over the vocabulary of the logits' distances.
        largest: Float64 [p], the largest.
        contexts: Float64 [L, p], the largest of each layer's attention output.
    """

    rms: Doubles
    largest: Doubles
    contexts: Doubles

    @classmethod
    def between(
        cls, exact_pV: Floats, found_pV: Floats, exact_LpC: Floats, found_LpC: Floats
    ) -> Yardstick:
        """Measure what PyTorch found against what is exact; C = H·D.

        Where the narrow precision overflows, it says nothing of what may be lost: that counts as 0.
        """
        pairs = list(zip(exact_pV, found_pV, strict=True))
        errors = [distances(exact_V, found_V) for exact_V, found_V in pairs]
        rms, largest = np.array(errors).reshape(-1, 2).T
        contexts = np.abs(exact_LpC.astype(np.float64) - found_LpC).max(axis=2)
        return cls(*(np.where(np.isfinite(a), a, 0.0) for a in (rms, largest, contexts)))

    def or_worse(self, other: Yardstick) -> Yardstick:
        """The larger of two distances at every position."""
        return Yardstick(
            np.maximum(self.rms, other.rms),
            np.maximum(self.largest, other.largest),
            np.maximum(self.contexts, other.contexts),
        )


@dataclass(frozen=True, eq=False)
class Typical:
    """The yardstick's medians over all positions of all texts.

    Attributes:
        rms: Of `Yardstick.rms`.
        largest: Of `Yardstick.largest`.
        contexts: Float64 [L], of `Yardstick.contexts`.
    """

    rms: float
    largest: float
    contexts: Doubles

    @classmethod
    def of(cls, yardsticks: Sequence[Yardstick]) -> Typical:
        """The medians: a few positions that magnify every error move them little."""
        return cls(
            float(np.median(np.concatenate([each.rms for each in yardsticks]))),
            float(np.median(np.concatenate([each.largest for each in yardsticks]))),
            np.median(np.concatenate([each.contexts for each in yardsticks], axis=1), axis=1),
        )


def distances(exact_V: Floats, found_V: Floats) -> tuple[float, float]:
    """Root mean square and largest of the distances of one position's logits."""
    difference = found_V.astype(np.float64) - exact_V
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())
