"""Where a layout's queries, keys and values lie, on made-up attention modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.families.head_layouts import (
    BlockedHeads,
    HeadLayout,
    InterleavedHeads,
    LayerHeads,
)

# Four query heads in two groups
HEADS = LayerHeads(query=4, key_value=2, size=3)
ORDER = [3, 2, 0, 1]
# The parts of each head, in the order of their outputs
BLOCKED = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
INTERLEAVED = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
REORDERED = {"q0": "q3", "q1": "q2", "q2": "q0", "q3": "q1", "k0": "k1", "k1": "k0"} | {
    "v0": "v1",
    "v1": "v0",
}


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    ("layout", "parts"), [(BlockedHeads, BLOCKED), (InterleavedHeads, INTERLEAVED)]
)
@torch.no_grad()
def test_values_are_cut_out_and_heads_move_in_packed_projections(
    layout: Any, parts: list[str], make: Any
) -> None:
    packed: Any = make(5, 24)
    nn.init.normal_(packed.bias)
    attention = nn.Module()
    attention.packed = packed
    heads: HeadLayout = layout("packed")
    hidden = torch.randn(2, 7, 5)
    before = dict(zip(parts, packed(hidden).split(3, dim=-1), strict=True))

    values = heads.cut_values(attention, HEADS)

    expected = torch.cat([before["v0"], before["v1"]], dim=-1)
    torch.testing.assert_close(values(hidden), expected)
    # A view would keep the whole packed matrix alive
    assert values.weight.untyped_storage().nbytes() == values.weight.nbytes
    assert values.weight.is_contiguous()

    heads.reorder(attention, HEADS, ORDER)

    for part, found in zip(parts, packed(hidden).split(3, dim=-1), strict=True):
        torch.testing.assert_close(found, before[REORDERED[part]])


@pytest.mark.parametrize("trained", [True, False])
def test_values_that_are_cut_out_stay_frozen_or_trained(trained: bool) -> None:
    attention = nn.Module()
    attention.packed = nn.Linear(5, 24).requires_grad_(trained)
    values = BlockedHeads("packed").cut_values(attention, HEADS)
    assert all(parameter.requires_grad is trained for parameter in values.parameters())
