"""Rounds a weight so that later inputs make up for what rounding earlier ones lost.

The inputs of a weight are rounded one after the other, and after each the ones that are still open
take over what its rounding does to the outputs on calibration text: GPTQ (arXiv 2210.17323). What
is aimed at is what the unrounded model computes from its own inputs, though the rounded model's are
off by all that was rounded before; GPTAQ (arXiv 2504.02692) has the same aim, which is reached here
by a regression in front of the rounding.

N outputs, K inputs, T tokens, X inputs of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from echoatt_exporter.quantise.block_quantizer import OFFSETS, zero_level
from echoatt_runtime.contract import Bits

# Inputs whose errors are handed on to all later ones at once
_AT_ONCE: Final = 128
# Outputs do not know of each other; so many of them, at so many inputs, stay in a core's cache
_OUTPUTS_AT_ONCE: Final = 4096
# What is added to the Gram matrix's diagonal, of its mean
_DAMPING: Final = 0.3


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration text says of the inputs at one place.

    Attributes:
        rounded: The rounded model's, float32 [T, K].
        drift: What the unrounded model's are more, float32 [T, K].
        factor: U, upper triangular [K, K]; UᵀU is the inverse of the rounded model's damped Gram
            matrix.
    """

    rounded: torch.Tensor
    drift: torch.Tensor
    factor: torch.Tensor

    @cached_property
    def drift_gram(self) -> torch.Tensor:
        """DᵀX [K, K], with D the drift and X the rounded model's inputs."""
        return self.drift.T @ self.rounded

    @classmethod
    def of(cls, exact_TK: torch.Tensor, rounded_TK: torch.Tensor) -> Inputs:
        """Take both models' inputs for the same tokens."""
        return cls(rounded_TK, exact_TK - rounded_TK, _inverse_factor(rounded_TK))


def round_compensated(
    weight_NK: torch.Tensor, inputs: Inputs, bits: Bits, block_size: int
) -> torch.Tensor:
    """Round a weight to levels of symmetric blocks by what that does to its outputs.

    Args:
        weight_NK: Float32 [N, K].
        inputs: What it multiplies.
        bits: A level's.
        block_size: X.

    Returns:
        The rounded weight, float32 [N, K].
    """
    factor_KK = inputs.factor
    open_NK = _towards_exact(weight_NK, inputs)
    size = open_NK.shape[1]
    for open_nK in torch.split(open_NK, _OUTPUTS_AT_ONCE):
        for begin in range(0, size, _AT_ONCE):
            end = min(begin + _AT_ONCE, size)
            errors = _round_in_place(
                open_nK[:, begin:end], factor_KK[begin:end, begin:end], bits, block_size
            )
            open_nK[:, end:].addmm_(errors, factor_KK[begin:end, end:], alpha=-1)
    return open_NK


def _inverse_factor(inputs_TK: torch.Tensor) -> torch.Tensor:
    """U for the damped Gram matrix G of some inputs: U⁻¹U⁻ᵀ = G.

    The damping bounds the span of G's eigenvalues by K / 0.3, so that float32 is enough.
    """
    gram = inputs_TK.T @ inputs_TK
    diagonal = gram.diagonal()
    # An input that is always 0 has no say
    diagonal.add_(_DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny))
    # With both axes reversed, a lower factor is an upper one
    root = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    one = torch.eye(len(root), dtype=root.dtype)
    inverse: torch.Tensor = torch.linalg.solve_triangular(root, one, upper=True)
    return inverse


def _towards_exact(weight_NK: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The weight with which the rounded model's inputs give what the unrounded model's should.

    It is the regression W + W·DᵀX·G⁻¹, with D the drift, X the rounded model's inputs and G their
    damped Gram matrix.
    """
    outputs, size = weight_NK.shape
    # An LM head has more outputs than there are tokens
    if outputs > size:
        drift_NK = weight_NK @ inputs.drift_gram
    else:
        drift_NK = (inputs.drift @ weight_NK.T).T @ inputs.rounded
    return weight_NK + (drift_NK @ inputs.factor.T) @ inputs.factor


def _round_in_place(
    open_Nn: torch.Tensor, factor_nn: torch.Tensor, bits: Bits, block_size: int
) -> torch.Tensor:
    """Round some neighbouring inputs; give their errors as later inputs have to take them over."""
    outermost = zero_level(bits)
    errors = torch.empty_like(open_Nn)
    importance_n = factor_nn.diagonal() ** -2
    scale_N = open_Nn.new_empty(len(open_Nn))
    for index in range(open_Nn.shape[1]):
        if index % block_size == 0:
            block = slice(index, index + block_size)
            scale_N = _scales(open_Nn[:, block], importance_n[block], bits)
        column_N = open_Nn[:, index]
        rounded_N = (column_N / scale_N).round_().clamp_(-outermost, outermost - 1).mul_(scale_N)
        errors[:, index] = (column_N - rounded_N) / factor_nn[index, index]
        open_Nn[:, index] = rounded_N
        open_Nn[:, index + 1 :].addr_(errors[:, index], factor_nn[index, index + 1 :], alpha=-1)
    return errors


def _scales(block_NX: torch.Tensor, importance_X: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Scales [N] of the least squared error among those tried, weighted by the inputs' importance.

    An input's importance is what an error there costs after the later ones made up for it.
    """
    outermost = zero_level(bits)
    largest_N1 = block_NX.gather(1, block_NX.abs().argmax(1, keepdim=True))
    inverse_N1 = torch.where(largest_N1 != 0, 1 / largest_N1, 0)
    gains_N = torch.zeros_like(largest_N1[:, 0])
    # All of a block's elements may be 0
    scales_N = torch.ones_like(gains_N)
    weighted_NX = block_NX * importance_X
    for offset in OFFSETS:
        levels = block_NX * (inverse_N1 * (-outermost - offset))
        levels = levels.round_().clamp_(-outermost, outermost - 1)
        product_N = (weighted_NX * levels).sum(1)
        square_N = (levels.square() * importance_X).sum(1)
        gain_N = product_N.square() / square_N
        better = gain_N > gains_N
        gains_N = torch.where(better, gain_N, gains_N)
        scales_N = torch.where(better, product_N / square_N, scales_N)
    return scales_N
