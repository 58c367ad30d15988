"""Decoders whose layers differ in their heads, which no supported family has yet."""

from __future__ import annotations

import pytest

from echoatt_exporter import SharingPlan
from echoatt_exporter.analyze.neighbourhood import admissible_pairs
from echoatt_exporter.architecture import DecoderArchitecture, specification_fields
from echoatt_runtime.errors import PlanError

UNEVEN = DecoderArchitecture(
    family="llama",
    layer_kinds=("full",) * 4,
    sliding_window=None,
    query_heads=(4, 4, 6, 6),
    kv_heads=(2, 4, 2, 2),
    head_dims=(8, 8, 4, 4),
    vocab_size=100,
    context_length=64,
)


def test_a_plan_is_held_against_each_layers_own_heads() -> None:
    UNEVEN.validate_plan(SharingPlan((0, 0, 2, 2)))
    with pytest.raises(PlanError, match=r"layer 2 \(6 query heads\) uses layer 0 \(4 query heads"):
        UNEVEN.validate_plan(SharingPlan((0, 0, 0, 3)))
    # In layer 1 every head has keys of its own; in layer 3 three share them
    order = SharingPlan((0, 0, 2, 2), ((), (2, 0, 3, 1), (), (5, 4, 3, 0, 2, 1)))
    UNEVEN.validate_plan(order)
    with pytest.raises(PlanError, match=r"layer 3's head order .* splits a key/value group"):
        UNEVEN.validate_plan(SharingPlan((0, 0, 2, 2), ((), (), (), (0, 5, 1, 2, 3, 4))))


def test_only_layers_with_as_many_query_heads_are_paired() -> None:
    assert list(admissible_pairs(UNEVEN.sharing_kinds)) == [(1, 0), (3, 2)]


def test_a_specification_says_each_layers_own_heads() -> None:
    assert specification_fields(UNEVEN) == {
        "family": "llama",
        "layer_kinds": ("full",) * 4,
        "sliding_window": None,
        "query_heads": (4, 4, 6, 6),
        "kv_heads": (2, 4, 2, 2),
        "head_dims": (8, 8, 4, 4),
        "vocab_size": 100,
        "context_length": 64,
    }
