"""The divergence of one row's distribution from another's, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from echoatt_exporter.evaluate.divergence import next_token_divergence, same_top_token


def _logits(*rows: list[float]) -> torch.Tensor:
    """Logits of these probabilities, each row shifted by a constant of its own."""
    shifts = torch.arange(len(rows))[:, None] * 3.0 - 1.0
    return torch.tensor(rows).log() + shifts


def test_divergence_by_hand() -> None:
    reference = _logits([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])
    model = _logits([0.25, 0.75], [0.5, 0.5], [0.9, 0.1]) + 7.0
    expected = [
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.0,
    ]
    found = next_token_divergence(reference, model)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_divergence_far_below_float32_is_still_there() -> None:
    """Of a difference d of a logit it is p(1-p)/2 d² to second order, and never negative."""
    reference = torch.tensor([[0.0, 1.0, 20.0, 19.0]])
    model = reference.clone()
    model[0, 3] += 1e-5
    p = torch.softmax(reference.double(), -1)[0, 3].item()
    moved = (model[0, 3] - reference[0, 3]).item()
    expected = p * (1 - p) / 2 * moved**2
    assert next_token_divergence(reference, model).item() == pytest.approx(expected, rel=1e-3)


def test_tokens_that_are_ruled_out() -> None:
    never, even = _logits([0.5, 0.5, 0.0]), _logits([0.25, 0.25, 0.5])
    assert next_token_divergence(never, even).item() == pytest.approx(math.log(2))
    assert next_token_divergence(never, never).item() == 0
    assert next_token_divergence(even, never).item() == math.inf
    assert math.isnan(next_token_divergence(even * math.nan, even).item())


def test_same_top_token() -> None:
    reference = _logits([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5])
    model = _logits([0.4, 0.3, 0.3], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4])
    assert same_top_token(reference, model).tolist() == [True, False, True]


def test_no_rows_are_no_divergences() -> None:
    empty = torch.empty(0, 5)
    assert next_token_divergence(empty, empty).shape == (0,)
    assert same_top_token(empty, empty).shape == (0,)
