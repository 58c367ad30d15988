"""Measures of predictions, on numbers worked out by hand."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from echoatt_runtime import measures
from echoatt_runtime.measures import (
    kl_divergence,
    log_probabilities,
    log_softmax,
    perplexity,
    same_top_token,
    spread,
)

Array = npt.NDArray[Any]


def _logits(*rows: list[float]) -> Array:
    """Logits of these probabilities, each row shifted by a constant of its own."""
    shifts = np.arange(len(rows))[:, None] * 3.0 - 1.0
    with np.errstate(divide="ignore"):
        return (np.log(rows) + shifts).astype(np.float32)


def test_log_softmax() -> None:
    found = log_softmax(_logits([0.5, 0.25, 0.25], [0.125, 0.875, 0.0]))
    assert found.dtype == np.float64
    expected = [
        [math.log(0.5), math.log(0.25), math.log(0.25)],
        [math.log(0.125), math.log(0.875), -math.inf],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Logits that neither float32 nor float64 can take the exponential of
    far = log_softmax(np.array([[3e4, 3e4 + 1, -3e38]], np.float32))
    np.testing.assert_allclose(far[0, :2], [-math.log1p(math.e), -math.log1p(1 / math.e)])
    assert far[0, 2] < -2.9e38


def test_log_probabilities_and_perplexity() -> None:
    logits = _logits([0.5, 0.25, 0.25], [0.2, 0.8, 0.0], [0.2, 0.8, 0.0])
    found = log_probabilities(logits, np.array([2, 1, 2]))
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([math.log(0.25), math.log(0.8), -math.inf], rel=1e-6)
    # Of what was given 1/4 and 4/5 the geometric mean is 1/sqrt(5)
    assert perplexity(found[:2]) == pytest.approx(math.sqrt(5))
    # As many float32 numbers lose the last digits when they are summed up as what they are
    assert perplexity(np.full(100_000, -0.1, np.float32)) == pytest.approx(math.exp(0.1), rel=1e-8)


def test_divergence() -> None:
    reference = _logits([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])
    model = _logits([0.25, 0.75], [0.5, 0.5], [0.9, 0.1]) + np.float32(7)
    expected = [
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.0,
    ]
    found = kl_divergence(reference, model)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e-10])
def test_divergence_far_below_float32_is_still_there(size: float) -> None:
    """Where one logit moves by d, it is log(1 + p (exp(d) - 1)) - p d."""
    reference = np.random.default_rng(0).normal(0, 3, (1, 151_936)).astype(np.float32)
    top = int(reference.argmax())
    powers = [math.exp(logit) for logit in reference[0].astype(float)]
    p = powers[top] / math.fsum(powers)
    model = reference.copy()
    model[0, top] += math.sqrt(2 * size / (p * (1 - p)))
    moved = float(model[0, top]) - float(reference[0, top])
    expected = math.log1p(p * math.expm1(moved)) - p * moved
    assert expected == pytest.approx(size, rel=0.1)
    assert kl_divergence(reference, model).item() == pytest.approx(expected, rel=1e-4)


def test_divergence_is_never_negative() -> None:
    reference = np.random.default_rng(1).normal(0, 3, (200, 301)).astype(np.float32)
    found = kl_divergence(reference, reference + np.float32(0.1))
    assert found.min() >= 0
    assert found.max() < 1e-12


def test_tokens_that_are_ruled_out() -> None:
    never, even = _logits([0.5, 0.5, 0.0]), _logits([0.25, 0.25, 0.5])
    assert kl_divergence(never, even).item() == pytest.approx(math.log(2))
    assert kl_divergence(never, never).item() == 0
    assert kl_divergence(even, never).item() == math.inf
    # What float64 has no probability for adds nothing either
    unlikely = np.array([[0.0, 0.0, -800.0]])
    assert kl_divergence(unlikely, never.astype(np.float64)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_distribution(bad: float) -> None:
    good = _logits([0.5, 0.5], [0.5, 0.5], [0.25, 0.75])
    broken = good.copy()
    broken[0, 1] = bad
    broken[1] = -math.inf
    for found in (
        kl_divergence(good, broken),
        kl_divergence(broken, good),
        log_probabilities(broken, np.zeros(3, np.int64)),
        log_softmax(broken)[:, 0],
    ):
        assert np.isnan(found).tolist() == [True, True, False]


def test_same_top_token() -> None:
    reference = _logits([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2])
    model = _logits([0.4, 0.3, 0.3], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.5, 0.2, 0.3])
    assert same_top_token(reference, model).tolist() == [True, False, True, True]


def test_spread_is_of_all_rows_whatever_they_have_in_common() -> None:
    # Variances 1, 4 and 25
    pieces = [np.array([[9.0, 11.0], [-2.0, 2.0]], np.float32), np.array([[1000.0, 1010.0]])]
    assert spread(pieces) == pytest.approx(math.sqrt(10))
    assert spread([np.full((2, 3), 7.0, np.float32)]) == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    one, two = np.zeros((1, 5)), np.zeros((2, 5))
    for measure in (kl_divergence, same_top_token):
        with pytest.raises(ValueError, match=r"shapes \(1, 5\) and \(2, 5\) cannot be compared"):
            measure(one, two)


def test_no_rows_are_no_numbers() -> None:
    empty = np.empty((0, 5), np.float32)
    assert kl_divergence(empty, empty).shape == same_top_token(empty, empty).shape == (0,)
    assert log_probabilities(empty, np.empty(0, np.int64)).shape == (0,)
    assert log_softmax(empty).shape == (0, 5)


Measure = Callable[[Array, Array], Any]
EVERY: list[Measure] = [
    lambda reference, model: kl_divergence(reference, model),
    lambda reference, model: log_probabilities(model, np.arange(len(model)) % model.shape[1]),
    lambda reference, model: same_top_token(reference, model),
    lambda reference, model: spread([model]),
]


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    # Every other column, so that rows do not lie end to end
    reference, model = generator.normal(0, 3, (2, 7, 22)).astype(np.float32)[..., ::2]
    whole = [measure(reference, model) for measure in EVERY] + [log_softmax(model)]
    monkeypatch.setattr(measures, "_BLOCK", 3 * 11)
    cut = [measure(reference, model) for measure in EVERY] + [log_softmax(model)]
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_rows() -> None:
    rows = np.random.default_rng(3).normal(0, 3, (400, 8192)).astype(np.float32)
    for measure in EVERY:
        tracemalloc.start()
        measure(rows, rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < rows.nbytes / 4
