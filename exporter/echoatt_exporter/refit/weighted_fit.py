"""A regression for one projection, in which all tokens count alike."""

from __future__ import annotations

import torch

from echoatt_exporter.families.projections import weight_out_in
from echoatt_exporter.refit.least_squares import LeastSquares, Solution
from echoatt_exporter.refit.projection_calls import Projection


class WeightedFit:
    """Finds what to add to a projection so that it gives what is missing.

    Norms come behind, so what is missing matters by its share of what should be there. Without that
    the first token would decide, whose state is a hundred times the others' in many models.

    Shapes: B windows, T tokens, K inputs, N outputs.

    Attributes:
        projection: It is left as it is.
    """

    def __init__(self, projection: Projection) -> None:
        outputs, inputs = weight_out_in(projection).shape
        self.projection = projection
        device = projection.weight.device
        # A bias is the weight of an input that is always 1
        self._has_bias = projection.bias is not None
        self._squares = LeastSquares(inputs + self._has_bias, outputs, device)

    def add(
        self, inputs_BTK: torch.Tensor, missing_BTN: torch.Tensor, aim_BTN: torch.Tensor
    ) -> None:
        """Sum some tokens.

        Args:
            inputs_BTK: What goes in.
            missing_BTN: What is missing from what comes out.
            aim_BTN: What it is missing of.
        """
        if self._has_bias:
            inputs_BTK = torch.cat([inputs_BTK, torch.ones_like(inputs_BTK[..., :1])], dim=-1)
        square_BT1 = aim_BTN.square().mean(dim=-1, keepdim=True)
        # Of nothing, nothing can be missing
        weight_BT1 = torch.where(square_BT1 > 0, square_BT1.rsqrt(), 0)
        self._squares.add(
            (inputs_BTK * weight_BT1).flatten(0, 1), (missing_BTN * weight_BT1).flatten(0, 1)
        )

    @property
    def is_starved(self) -> bool:
        """Whether there are fewer tokens than inputs."""
        return self._squares.is_starved

    def solve(self) -> Solution:
        """What to add; in a last column to the bias, if there is one."""
        return self._squares.solve()
