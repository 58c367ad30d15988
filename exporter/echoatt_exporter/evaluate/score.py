"""What models' losses on a text come to, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.measures import perplexity

LEVEL = 0.95
_RESAMPLES = 2000
# Losses of neighbouring tokens are correlated; those of tokens this far apart hardly are
_BLOCK_TOKENS = 256
_FEWEST_BLOCKS = 32


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class TextScore:
    """A model's losses on a text.

    Attributes:
        nats: The loss of every scored token in the order of the text, float32 [tokens].
        bytes: The length of what was scored, UTF-8.
        token_digest: SHA-256 of the scored tokens' ids: scores are compared on the same ones only.
    """

    nats: NDArray[np.float32]
    bytes: int
    token_digest: str

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.nats)

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return float(self.nats.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return perplexity(-self.nats)

    @property
    def bits_per_byte(self) -> float:
        """The whole loss in bits over the text's bytes; comparable between tokenizers."""
        return float(self.nats.sum(dtype=np.float64)) / math.log(2) / self.bytes

    def interval(self, *, seed: int = 0) -> Interval:
        """The 95 % confidence interval of the perplexity, as `mean_interval` makes it."""
        return Interval(*map(math.exp, mean_interval(self.nats, seed=seed)))


@dataclass(frozen=True, slots=True)
class ScoreRatio:
    """One model's perplexity over another's.

    Attributes:
        ratio: Above 1 the first is worse.
        interval: Its 95 % confidence interval.
    """

    ratio: float
    interval: Interval


def mean_interval(values: NDArray[np.floating[Any]], *, seed: int = 0) -> Interval:
    """A 95 % confidence interval of the mean of a series whose neighbours are correlated.

    A bootstrap over blocks (Carlstein 1986): the series is cut into blocks of 256 consecutive
    values, or shorter ones where that would make fewer than 32; as many blocks are drawn with
    replacement, 2,000 times, and the interval goes from the 2.5th to the 97.5th percentile of the
    drawn means. It says how the mean would move with other text of the same kind.

    Args:
        values: [values], at least one.
        seed: For the draws.
    """
    size = max(1, min(_BLOCK_TOKENS, len(values) // _FEWEST_BLOCKS))
    starts = np.arange(0, len(values), size)
    sums = np.add.reduceat(values.astype(np.float64), starts)
    counts = np.diff(starts, append=len(values))
    generator = np.random.default_rng(seed)
    means = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        drawn = generator.integers(len(starts), size=len(starts))
        means[index] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def compare_scores(score: TextScore, reference: TextScore, *, seed: int = 0) -> ScoreRatio:
    """The ratio of two perplexities on the same tokens.

    Paired: what is drawn is the difference of the two losses of a token, so that what makes a text
    hard for both does not widen the interval.

    Args:
        score: The model's, a student's for one.
        reference: What it is held against, its teacher's.
        seed: As in `mean_interval`.

    Raises:
        AnalysisError: The scores are not of the same tokens.
    """
    if score.token_digest != reference.token_digest:
        raise AnalysisError(
            f"the scores are of different tokens ({score.tokens} and {reference.tokens} of them);"
            " compare models with the same tokenizer, on the same text"
        )
    difference = score.nats.astype(np.float64) - reference.nats
    interval = mean_interval(difference, seed=seed)
    return ScoreRatio(math.exp(difference.mean()), Interval(*map(math.exp, interval)))


@dataclass(frozen=True, slots=True, eq=False)
class TextComparison:
    """What two models predict of the same tokens.

    Attributes:
        score: The model's losses.
        reference: The losses of what it is held against.
        divergence: KL(reference ‖ model) of the next token's distribution where each scored token
            is predicted, in nats, float32 [tokens].
        agreement: Whether both find the same token most probable there, bool [tokens].
    """

    score: TextScore
    reference: TextScore
    divergence: NDArray[np.float32]
    agreement: NDArray[np.bool_]

    @property
    def kl(self) -> float:
        """The mean divergence, nats a token."""
        return float(self.divergence.mean(dtype=np.float64))

    def kl_interval(self, *, seed: int = 0) -> Interval:
        """The 95 % confidence interval of `kl`, as `mean_interval` makes it."""
        return mean_interval(self.divergence, seed=seed)

    @property
    def top1_agreement(self) -> float:
        """The share of tokens where both find the same one most probable."""
        return float(self.agreement.mean())

    def ratio(self, *, seed: int = 0) -> ScoreRatio:
        """The model's perplexity over the reference's, as `compare_scores` makes it."""
        return compare_scores(self.score, self.reference, seed=seed)
