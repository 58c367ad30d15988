"""K rows, N columns."""

import numpy as np
import pytest

from echoatt_exporter.quantise import block_quantizer
from echoatt_exporter.quantise.block_quantizer import quantize_blocks, zero_level


def rounded(weight, bits, block_size=32):
    packed, scales = quantize_blocks(weight, bits, block_size)
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    levels = packed.astype(np.float32) - zero_level(bits)
    return (levels * scales[..., None]).reshape(len(packed), -1)[:, : len(weight)].T


def test_a_block_on_levels_is_kept_as_it_is():
    """Levels -8 to 7, times a quarter: nothing is lost, and the largest element is at level 0."""
    column = np.array([*range(-8, 8), *range(-8, 8)], np.float32) / 4
    packed, scales = quantize_blocks(column[:, None], 4, 32)
    assert scales.tolist() == [[0.25]]
    # of two levels in a byte the first has the lower half
    assert packed[0, 0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]

    packed, scales = quantize_blocks(-column[:, None], 4, 32)
    assert scales.tolist() == [[-0.25]]
    assert packed[0, 0, 0] == 0x10


def test_the_scale_is_that_of_the_least_squares():
    """One element of 8 and fifteen of 0.9: levels -8 and -1, x·q / q·q = 77.5 / 79."""
    column = np.zeros(32, np.float32)
    column[0], column[1:16] = 8, 0.9
    packed, scales = quantize_blocks(column[:, None], 4, 32)
    assert packed[0, 0, :8].tolist() == [0x70] + [0x77] * 7
    assert scales[0, 0] == pytest.approx(-77.5 / 79)


def test_a_column_of_zeros_stays_zero():
    assert not rounded(np.zeros((64, 3), np.float32), 4).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_beats_plain_rounding(bits):
    weight = np.random.default_rng(5).standard_normal((256, 64)).astype(np.float32)
    blocks = weight.reshape(8, 32, 64)
    index = np.abs(blocks).argmax(1, keepdims=True)
    step = -np.take_along_axis(blocks, index, 1) / zero_level(bits)
    levels = np.clip(np.rint(blocks / step), -zero_level(bits), zero_level(bits) - 1)
    plain = ((levels * step - blocks) ** 2).mean()
    searched = ((rounded(weight, bits) - weight) ** 2).mean()
    assert searched < plain * (0.92 if bits == 4 else 0.97)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_are_independent_of_how_many_are_done_at_once(monkeypatch, bits):
    weight = np.random.default_rng(6).standard_normal((40, 150)).astype(np.float32)
    whole = quantize_blocks(weight, bits, 32)
    monkeypatch.setattr(block_quantizer, "_COLUMNS_AT_ONCE", 7)
    portions = quantize_blocks(weight, bits, 32)
    for first, second in zip(whole, portions, strict=True):
        np.testing.assert_array_equal(first, second)
