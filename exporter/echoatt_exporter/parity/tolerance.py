"""How much more than its arithmetic loses a bundle may lose.

Float32 loses a millionth of the logits' spread at most positions and a hundredth at some: where
massive activations come up, at the first tokens of a text mostly, every rounding before them is
magnified. No fixed number tells such a bundle from a wrong one. So PyTorch says, for the very
weights and tokens and at each position, how far its own rounding takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a bundle's logits may be from what PyTorch computes in a wider precision.

    The yardstick is how far PyTorch itself is from that when it computes in the bundle's precision:
    at the same position, or the median of all positions where that is more (one position's luck
    must not set it), or the floor.

    Attributes:
        name: The arithmetic that the numbers are for.
        exact: What PyTorch computes in to be right.
        rounded: What PyTorch computes in for the yardstick.
        largest: Yardsticks that any one position may be away, in the root mean square over the
            vocabulary and in any single logit.
        typical: Yardsticks that the median of a case's positions may be away (root mean square).
        floor: The least yardstick, in units of the logits' spread, their standard deviation over
            the vocabulary.
    """

    name: str
    exact: torch.dtype
    rounded: torch.dtype
    largest: float
    typical: float
    floor: float

    @property
    def words(self) -> str:
        """What is allowed, and of what."""
        return (
            f"{self.largest:g} times what PyTorch loses in {dtype_name(self.rounded)} at a"
            f" position, or at most positions if that is more, and {self.typical:g} times in the"
            " middle of a case"
        )


# Measured, in yardsticks. On SmolLM2-135M (with nine followers in float32, unshared in int4; the
# random tokens of 24 seeds) right bundles are up to 7 away at any of 5,500 positions (median 0.8
# to 1.3, 99 of 100 below 5) and up to 1.9 in the middle of a case; books12 and tiny random models
# up to 1.0 there. Plans under which a token's errors grow a thousandfold made up to 20 in 2,000
# positions, against a yardstick of one run instead of two. A layer's scores or values that are 1 %
# too large are 150 to 840 away in the middle of a case, a lost mask row, an early token, swapped
# heads or another source thousands; on tiny models values that are 0.1 % too large 400. In 16
# bits: SmolLM2 in float16 is up to 3.6 away, and 0.8 in the middle. bfloat16 computed in float32
# rounds only scales and caps: tiny models of ten families are up to 0.6 of bfloat16's loss away at
# a position, and 0.1 in the middle.
TOLERANCES: Final = {
    tolerance.name: tolerance
    for tolerance in (
        Tolerance("fp32", torch.float64, torch.float32, 64, 16, 5e-7),
        Tolerance("fp16", torch.float32, torch.float16, 32, 8, 5e-4),
        Tolerance("bf16", torch.float32, torch.bfloat16, 32, 8, 4e-3),
        Tolerance("bf16 computed in float32", torch.float32, torch.bfloat16, 1.5, 0.3, 5e-4),
    )
}

# A single logit's distance is several times the root mean square of all
LARGEST_TO_RMS: Final = 8


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
