"""A regression whose statistics are summed over any amount of text, and that judges itself.

T tokens at once, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

# What may be added to the diagonal of the Gram matrix, in units of its mean
_RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, eq=False, slots=True)
class Solution:
    """What a regression found.

    Attributes:
        change: What to add to the weight, float64 [N, K].
        ridge: What was added to the diagonal of the Gram matrix, in units of its mean.
        left: Share of the missing mean square that a fit on one half of the text leaves in the
            other half; 1 or more where nothing was learned that holds elsewhere.
    """

    change: torch.Tensor
    ridge: float
    left: float


class LeastSquares:
    """Finds the change of a weight that adds what is missing from its outputs.

    With X the inputs and M what is missing, both over all tokens, it is the least of
    ‖M - X·C‖² + λ‖C‖². Only XᵀX, XᵀM and ‖M‖² are needed. They are kept of two halves of the text:
    each is fitted on one and judged on the other, and λ is the one that holds best.

    Attributes:
        tokens: How many were summed.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Begin with no tokens.

        Args:
            inputs: K.
            outputs: N.
            device: Where the sums are.
        """
        self.tokens = 0
        self._halves = [_Sums(inputs, outputs, device) for _ in range(2)]

    def add(self, inputs_TK: torch.Tensor, missing_TN: torch.Tensor) -> None:
        """Sum some more tokens; the first half of them and the second are judged by each other."""
        self.tokens += len(inputs_TK)
        parts = zip(inputs_TK.chunk(2), missing_TN.chunk(2), strict=True)
        for half, (inputs, missing) in zip(self._halves, parts, strict=False):
            half.add(inputs, missing)

    @property
    def is_starved(self) -> bool:
        """Whether there are fewer tokens than inputs, so that the ridge alone decides."""
        return self.tokens < len(self._halves[0].gram_KK)

    def solve(self) -> Solution:
        """The best change."""
        one, other = self._halves
        judged = {
            ridge: other.left(one.solve(ridge)) + one.left(other.solve(ridge)) for ridge in _RIDGES
        }
        ridge = min(judged, key=judged.__getitem__)
        missing = one.missing + other.missing
        change_KN = _Sums.together(one, other).solve(ridge)
        return Solution(change_KN.T, ridge, judged[ridge] / missing if missing else 1.0)


class _Sums:
    """The sums of some tokens."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram_KK = torch.zeros((inputs, inputs), dtype=torch.float64, device=device)
        self.cross_KN = torch.zeros((inputs, outputs), dtype=torch.float64, device=device)
        self.missing = 0.0

    @classmethod
    def together(cls, one: _Sums, other: _Sums) -> _Sums:
        inputs, outputs = one.cross_KN.shape
        sums = cls(inputs, outputs, one.cross_KN.device)
        sums.gram_KK = one.gram_KK + other.gram_KK
        sums.cross_KN = one.cross_KN + other.cross_KN
        sums.missing = one.missing + other.missing
        return sums

    def add(self, inputs_TK: torch.Tensor, missing_TN: torch.Tensor) -> None:
        # Sums of so few products are exact enough in float32
        inputs_TK, missing_TN = inputs_TK.float(), missing_TN.float()
        self.gram_KK += inputs_TK.T @ inputs_TK
        self.cross_KN += inputs_TK.T @ missing_TN
        self.missing += float(missing_TN.double().square().sum())

    def left(self, change_KN: torch.Tensor) -> float:
        """‖M - X·C‖²."""
        rest_KN = self.gram_KK @ change_KN - 2 * self.cross_KN
        return self.missing + float((change_KN * rest_KN).sum())

    def solve(self, ridge: float) -> torch.Tensor:
        """C, float64 [K, N]."""
        gram_KK = self.gram_KK.clone()
        # Inputs that are always 0 have no say
        tiny = torch.finfo(torch.float64).tiny
        gram_KK.diagonal().add_(ridge * gram_KK.diagonal().mean().clamp_min(tiny))
        return torch.cholesky_solve(self.cross_KN, torch.linalg.cholesky(gram_KK))
