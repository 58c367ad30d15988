"""Confidence intervals and ratios of perplexities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from echoatt_exporter import AnalysisError
from echoatt_exporter.evaluate.score import (
    TextComparison,
    TextScore,
    compare_scores,
    mean_interval,
)


def _score(nats: object, digest: str = "same") -> TextScore:
    return TextScore(np.asarray(nats, dtype=np.float32), 1000, digest)


def test_independent_losses_give_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 20_000)
    low, high = mean_interval(values)
    half = 1.96 * 2.0 / math.sqrt(20_000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert low < values.mean() < high
    assert mean_interval(values) == (low, high)
    assert mean_interval(values, seed=1) != (low, high)


def test_losses_that_come_in_runs_give_a_wider_one() -> None:
    runs = np.random.default_rng(0).normal(3.0, 2.0, 100).repeat(200)
    low, high = mean_interval(runs)
    # As many independent values as there are runs, give or take
    assert (high - low) / 2 == pytest.approx(1.96 * 2.0 / math.sqrt(100), rel=0.3)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(50):
        low, high = mean_interval(generator.exponential(2.0, 1500))
        covered += low <= 2.0 <= high
    assert covered >= 43


@pytest.mark.parametrize("count", [1, 2, 33, 257])
def test_few_values_still_have_an_interval_around_their_mean(count: int) -> None:
    values = np.random.default_rng(1).normal(size=count)
    low, high = mean_interval(values)
    assert low <= values.mean() + 1e-12
    assert high >= values.mean() - 1e-12


def test_perplexity_interval_is_the_means() -> None:
    score = _score(np.random.default_rng(0).normal(3.0, 1.0, 4000))
    low, high = score.interval()
    assert low < score.perplexity < high
    assert math.log(high) - math.log(low) == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.25)


def test_a_model_against_itself_is_one_and_sure() -> None:
    score = _score(np.random.default_rng(0).normal(3.0, 1.0, 1000))
    compared = compare_scores(score, score)
    assert (compared.ratio, compared.interval) == (1.0, (1.0, 1.0))


def test_what_is_hard_for_both_does_not_widen_the_ratio() -> None:
    generator = np.random.default_rng(0)
    nats = generator.normal(3.0, 2.0, 4000)
    worse = nats + 0.1 + generator.normal(0.0, 0.1, 4000)
    compared = compare_scores(_score(worse), _score(nats))
    assert compared.ratio == pytest.approx(math.exp(0.1), rel=0.01)
    low, high = compared.interval
    assert low < compared.ratio < high
    assert high - low < 0.02
    single = _score(nats).interval()
    assert (single.high - single.low) / math.exp(3.0) > 5 * (high - low)


def test_other_tokens_cannot_be_compared() -> None:
    with pytest.raises(AnalysisError, match=r"of different tokens \(3 and 2 of them\)"):
        compare_scores(_score([1, 2, 3]), _score([1, 2], "other"))


def test_comparison_sums_up_its_tokens() -> None:
    generator = np.random.default_rng(0)
    model, reference = _score(generator.normal(3.1, 1.0, 400)), _score(np.full(400, 3.0))
    divergence = generator.exponential(0.2, 400).astype(np.float32)
    compared = TextComparison(model, reference, divergence, np.arange(400) % 4 > 0)
    assert compared.kl == pytest.approx(divergence.mean(), rel=1e-6)
    assert compared.kl_interval() == mean_interval(divergence)
    assert compared.kl_interval(seed=1) == mean_interval(divergence, seed=1)
    assert compared.top1_agreement == 0.75
    assert compared.ratio() == compare_scores(model, reference)
