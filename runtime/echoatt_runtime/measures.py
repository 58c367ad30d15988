"""How well rows of logits predict tokens, and how far they are from another model's.

Everything is computed in float64, a few rows at a time, so that what is held beside arguments and
results is bounded however many rows there are. What rounding or an int8 cache costs is often less
than float32's own error in a sum over the vocabulary. A row with a NaN, with an infinity above
zero or with nothing but infinities below it is no distribution: what is measured of it is NaN.

Shapes in names: R rows (predicted tokens), V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "kl_divergence",
    "log_probabilities",
    "log_softmax",
    "perplexity",
    "same_top_token",
    "spread",
]

Logits = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]

# Numbers of a block of rows: three float64 tables of them stay in a core's own cache
_BLOCK: Final = 1 << 16


def log_softmax(logits_RV: Logits) -> Doubles:
    """The logarithm of each row's softmax.

    Args:
        logits_RV: Of any floating type; minus infinity rules a token out.

    Returns:
        Log-probabilities in nats, float64 [R, V].
    """
    log_p_RV = np.empty(logits_RV.shape)
    with np.errstate(invalid="ignore"):
        for rows in _blocks(logits_RV):
            block_RV = _shift(logits_RV[rows], log_p_RV[rows])
            block_RV -= np.log(np.exp(block_RV).sum(axis=1, keepdims=True))
    return log_p_RV


def log_probabilities(logits_RV: Logits, tokens_R: npt.NDArray[np.integer[Any]]) -> Doubles:
    """The log-probability that each row gives one token; its negative is the token's loss.

    Args:
        logits_RV: As in `log_softmax`.
        tokens_R: The tokens that came, ids from 0 to V - 1.

    Returns:
        Nats, float64 [R].
    """
    log_p_R = np.empty(len(logits_RV))
    scratch_RV = _scratch(logits_RV)
    with np.errstate(invalid="ignore"):
        for rows in _blocks(logits_RV):
            shifted_RV = _shift(logits_RV[rows], scratch_RV)
            chosen_R = np.take_along_axis(shifted_RV, tokens_R[rows, None], axis=1)[:, 0]
            log_p_R[rows] = chosen_R - np.log(np.exp(shifted_RV, out=shifted_RV).sum(axis=1))
    return log_p_R


def kl_divergence(reference_RV: Logits, model_RV: Logits) -> Doubles:
    """The Kullback-Leibler divergence KL(reference ‖ model) of each row's distribution.

    The sum over the vocabulary of p · (log p - log q), p the reference's probabilities and q the
    model's (Kullback and Leibler 1951): how many nats the model's loss is above the reference's own
    where the next token is drawn from the reference. A token whose p is 0 in float64 adds nothing,
    whatever the model says of it.

    Args:
        reference_RV: As in `log_softmax`.
        model_RV: Logits over the same vocabulary, of the same rows.

    Returns:
        Nats, float64 [R], at least 0; infinite where the model rules out a token that the reference
        does not.

    Raises:
        ValueError: The shapes differ.
    """
    _check_same_shape(reference_RV, model_RV)
    kl_R = np.empty(len(reference_RV))
    scratches = [_scratch(reference_RV) for _ in range(3)]
    with np.errstate(invalid="ignore"):
        for rows in _blocks(reference_RV):
            # Log-probabilities but for what all of a row have in common
            log_p_RV = _shift(reference_RV[rows], scratches[0])
            log_q_RV = _shift(model_RV[rows], scratches[1])
            weight_RV = scratches[2][: len(log_p_RV)]
            q_sum_R = np.exp(log_q_RV, out=weight_RV).sum(axis=1)
            p_sum_R = np.exp(log_p_RV, out=weight_RV).sum(axis=1)
            difference_RV = np.subtract(log_p_RV, log_q_RV, out=log_q_RV)
            np.copyto(difference_RV, 0.0, where=weight_RV == 0)
            # Not as a dot product: BLAS would start threads for it, which wait for each other
            mean_R = np.multiply(weight_RV, difference_RV, out=difference_RV).sum(axis=1) / p_sum_R
            kl_R[rows] = mean_R + np.log(q_sum_R / p_sum_R)
    # Rounding may leave the least of divergences a shade below nothing
    return np.maximum(kl_R, 0.0, out=kl_R)


def same_top_token(reference_RV: Logits, model_RV: Logits) -> npt.NDArray[np.bool_]:
    """Whether both find the same token most probable: bool [R].

    Of equals the first counts. The mean over rows is the top-1 agreement.

    Args:
        reference_RV: As in `log_softmax`.
        model_RV: As in `kl_divergence`.

    Raises:
        ValueError: The shapes differ.
    """
    _check_same_shape(reference_RV, model_RV)
    same_R: npt.NDArray[np.bool_] = reference_RV.argmax(axis=1) == model_RV.argmax(axis=1)
    return same_R


def spread(pieces: Iterable[Logits]) -> float:
    """The logits' standard deviation over the vocabulary, as root mean square over all rows.

    Softmax ignores what all logits of a row have in common, so this is the scale on which a
    difference of logits is large or small.

    Args:
        pieces: Logits [R, V], at least one row in all; R may differ from piece to piece.

    Returns:
        In the logits' own unit; 0 where each row's are all equal.
    """
    variances = [
        logits_RV[rows].var(axis=1, dtype=np.float64)
        for logits_RV in pieces
        for rows in _blocks(logits_RV)
    ]
    return math.sqrt(np.concatenate(variances).mean())


def perplexity(log_probabilities_N: npt.NDArray[np.floating[Any]]) -> float:
    """The exponential of the mean loss.

    Args:
        log_probabilities_N: What a model gave the tokens that came, in nats; at least one.
    """
    return math.exp(-float(log_probabilities_N.mean(dtype=np.float64)))


def _check_same_shape(reference_RV: Logits, model_RV: Logits) -> None:
    if reference_RV.shape != model_RV.shape:
        raise ValueError(
            f"logits of shapes {reference_RV.shape} and {model_RV.shape} cannot be compared; give"
            " both models' on the same tokens"
        )


def _blocks(logits_RV: Logits) -> Iterator[slice]:
    size = _block_rows(logits_RV)
    return (slice(start, start + size) for start in range(0, len(logits_RV), size))


def _block_rows(logits_RV: Logits) -> int:
    return max(1, _BLOCK // int(logits_RV.shape[1]))


def _scratch(logits_RV: Logits) -> Doubles:
    """Room for the largest block."""
    return np.empty((min(_block_rows(logits_RV), len(logits_RV)), logits_RV.shape[1]))


def _shift(logits_RV: Logits, out_RV: Doubles) -> Doubles:
    """Write a block's logits, less the largest of their row, into the first rows of `out_RV`."""
    largest_R1 = logits_RV.max(axis=1, keepdims=True)
    shifted_RV = out_RV[: len(logits_RV)]
    # Numpy would subtract in the logits' own type without being told
    np.subtract(logits_RV, largest_R1, out=shifted_RV, dtype=np.float64)
    return shifted_RV
