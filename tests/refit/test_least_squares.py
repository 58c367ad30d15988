"""Regressions against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from echoatt_exporter.refit.least_squares import LeastSquares

CPU = torch.device("cpu")


def _solve(inputs: list[list[float]], missing: list[list[float]]) -> LeastSquares:
    squares = LeastSquares(len(inputs[0]), len(missing[0]), CPU)
    squares.add(torch.tensor(inputs), torch.tensor(missing))
    return squares


def test_what_holds_on_both_halves_is_found_with_the_least_ridge() -> None:
    # M = 2·X in all tokens: XᵀX = 1+4+9+16 = 30, XᵀM = 60, and C = 60 / (30 + 0.001·30)
    found = _solve([[1], [2], [3], [4]], [[2], [4], [6], [8]]).solve()
    assert found.ridge == 1e-3
    assert float(found.change) == pytest.approx(60 / 30.03, rel=1e-12)
    # One half's C is 2/1.001, so that 2·0.001/1.001 of X is left of 2·X
    assert found.left == pytest.approx((0.001 / 1.001) ** 2, rel=1e-6)


def test_two_inputs_share_what_is_missing() -> None:
    # XᵀX = [[4, 2], [2, 2]] and XᵀM = [6, 4]: without a ridge C = [1, 1]. Its mean diagonal is 3.
    squares = _solve([[1, 0], [1, 1], [1, 0], [1, 1]], [[1], [2], [1], [2]])
    a, b, ridge = 4.003, 2.003, 1e-3
    found = squares.solve()
    assert found.ridge == ridge
    determinant = a * b - 4
    expected = [(6 * b - 8) / determinant, (4 * a - 12) / determinant]
    assert found.change.tolist()[0] == pytest.approx(expected, rel=1e-12)


def test_what_one_half_says_against_the_other_is_not_learned() -> None:
    found = _solve([[1], [1], [1], [1]], [[1], [1], [-1], [-1]]).solve()
    assert found.left > 1
    assert found.ridge == 1.0


def test_inputs_that_are_always_zero_or_alike_do_no_harm() -> None:
    found = _solve([[1, 1, 0], [2, 2, 0], [3, 3, 0], [4, 4, 0]], [[2], [4], [6], [8]]).solve()
    one, other, nothing = found.change.tolist()[0]
    assert one == pytest.approx(1, abs=1e-3)
    assert (other, nothing) == (pytest.approx(one), 0)


def test_fewer_tokens_than_inputs_are_said() -> None:
    squares = LeastSquares(3, 1, CPU)
    squares.add(torch.ones(2, 3), torch.ones(2, 1))
    assert squares.is_starved
    squares.add(torch.ones(1, 3), torch.ones(1, 1))
    assert not squares.is_starved


def test_nothing_missing_changes_nothing() -> None:
    found = _solve([[1], [2]], [[0], [0]]).solve()
    assert (float(found.change), found.left) == (0, 1)
