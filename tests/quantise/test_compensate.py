"""N outputs, K inputs, T tokens."""

from __future__ import annotations

import pytest
import torch

from echoatt_exporter.quantise.compensate import Inputs, round_compensated

K, N, T = 96, 24, 400


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _nearest(weight_NK: torch.Tensor) -> torch.Tensor:
    """Rounded as nothing but its size asks for: inputs of equal power that know no other."""
    eye = torch.eye(weight_NK.shape[1])
    return round_compensated(weight_NK, Inputs.of(eye, eye), 4, 32)


def test_what_lies_on_levels_stays(generator: torch.Generator) -> None:
    levels = torch.randint(-8, 8, (N, K), generator=generator).float()
    # The largest magnitude of each block says what the scale is
    levels[:, ::32] = -8
    weight = (levels.view(N, -1, 32) * torch.rand(N, K // 32, 1, generator=generator)).view(N, K)
    inputs = _draw(generator, T, K)
    found = round_compensated(weight, Inputs.of(inputs, inputs), 4, 32)
    torch.testing.assert_close(found, weight)


def test_every_block_lies_on_at_most_sixteen_levels(generator: torch.Generator) -> None:
    inputs = _draw(generator, T, K) @ _draw(generator, K, K)
    found = round_compensated(_draw(generator, N, K), Inputs.of(inputs, inputs), 4, 32)
    for block in found.view(-1, 32):
        places = block / block[block != 0].abs().min()
        assert len(block.unique()) <= 16
        # Whole multiples of one step, if not of the smallest seen
        assert any(torch.allclose(places * n, (places * n).round(), atol=1e-3) for n in range(1, 9))


def test_correlated_inputs_make_up_for_each_other(generator: torch.Generator) -> None:
    """Where inputs say the same, only the sum of their weights matters."""
    few = _draw(generator, T, K // 8)
    inputs = few.repeat_interleave(8, dim=1) + 0.05 * _draw(generator, T, K)
    weight = _draw(generator, N, K)
    exact = inputs @ weight.T
    found = round_compensated(weight, Inputs.of(inputs, inputs), 4, 32)
    lost = (inputs @ found.T - exact).norm()
    assert lost < 0.4 * (inputs @ _nearest(weight).T - exact).norm()


def test_what_was_lost_in_front_is_made_up_for(generator: torch.Generator) -> None:
    """Inputs that came out 5 % too large want a weight that is 5 % smaller."""
    exact = _draw(generator, T, K)
    weight = _draw(generator, N, K)
    rounded = exact * 1.05
    found = round_compensated(weight, Inputs.of(exact, rounded), 8, 32)
    ratio = (found * weight).sum() / weight.square().sum()
    # The ridge keeps a part of it
    assert 1 / 1.05 < ratio < 0.97


def test_inputs_that_are_always_zero_do_no_harm(generator: torch.Generator) -> None:
    inputs = _draw(generator, T, K)
    inputs[:, 5:40] = 0
    weight = _draw(generator, N, K)
    found = round_compensated(weight, Inputs.of(inputs, inputs), 4, 32)
    assert torch.isfinite(found).all()
    nothing = round_compensated(weight, Inputs.of(inputs * 0, inputs * 0), 4, 32)
    assert torch.isfinite(nothing).all()
    zero = round_compensated(torch.zeros(N, K), Inputs.of(inputs, inputs), 4, 32)
    assert not zero.any()


def test_the_regression_is_the_same_for_few_and_many_outputs(generator: torch.Generator) -> None:
    exact = _draw(generator, T, K)
    rounded = exact + 0.3 * exact @ _draw(generator, K, K) / K**0.5
    weight = _draw(generator, 2 * K, K)
    inputs = Inputs.of(exact, rounded)
    many = round_compensated(weight, inputs, 8, 32)
    few = torch.cat([round_compensated(part, inputs, 8, 32) for part in weight.split(N)])
    # A value between two levels may go either way; without the regression both would be 0.3 away
    assert (many - few).norm() < 0.01 * weight.norm()
    assert (many - weight).norm() > 0.1 * weight.norm()
