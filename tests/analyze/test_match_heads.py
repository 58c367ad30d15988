"""Lining heads up: the best order there is, found again where it is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import VOCAB_SIZE
from tests.wording import whole
from transformers import PreTrainedModel

from echoatt_exporter import SharingPlan, share_attention
from echoatt_exporter.analyze.compare_maps import measure_similarity
from echoatt_exporter.analyze.match_heads import align_plan, match_heads
from echoatt_exporter.analyze.similarity import HeadSimilarity
from echoatt_exporter.architecture import architecture_of
from echoatt_runtime.errors import PlanError

WINDOWS = torch.randint(3, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))


def orders_that_keep_groups(heads: int, groups: int) -> Iterator[list[int]]:
    size = heads // groups
    inner = list(itertools.permutations(range(size)))
    for order in itertools.permutations(range(groups)):
        for choice in itertools.product(inner, repeat=groups):
            yield [
                group * size + head
                for group, heads_ in zip(order, choice, strict=True)
                for head in heads_
            ]


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (6, 2)])
def test_no_order_that_keeps_groups_is_better(heads: int, groups: int) -> None:
    for seed in range(5):
        pairs = np.random.default_rng(seed).random((heads, heads)).astype(np.float32)
        totals = {
            tuple(order): pairs[order, range(heads)].sum()
            for order in orders_that_keep_groups(heads, groups)
        }
        order = match_heads(pairs, groups)
        assert totals[order] == pytest.approx(max(totals.values()))


def twins(tiny_model: Callable[..., Any], kv_heads: int, order: list[int]) -> PreTrainedModel:
    """Two layers that read the same; head h of the second is head order[h] of the first."""
    teacher: Any = tiny_model("llama", num_hidden_layers=2, num_key_value_heads=kv_heads)
    first, second = teacher.model.layers
    group = 4 // kv_heads
    groups = [head // group for head in order[::group]]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
        for name, heads in (("q_proj", order), ("k_proj", groups)):
            weight = getattr(first.self_attn, name).weight
            moved = weight.view(-1, 12, weight.shape[1])[heads].reshape(weight.shape)
            getattr(second.self_attn, name).weight.copy_(moved)
    return teacher  # type: ignore[no-any-return]


def heads_of(teacher: PreTrainedModel) -> HeadSimilarity:
    return measure_similarity(
        teacher, WINDOWS, text_digest="", model="", checkpoint_digest="", seed=0
    )[1]


@pytest.mark.parametrize(
    ("kv_heads", "order"),
    [(4, [2, 0, 3, 1]), (2, [3, 2, 0, 1]), (1, [1, 2, 3, 0])],
    ids=["mha", "gqa", "mqa"],
)
def test_permuted_copy_is_found_and_the_student_is_the_teacher(
    kv_heads: int, order: list[int], tiny_model: Callable[..., Any]
) -> None:
    teacher = twins(tiny_model, kv_heads, order)
    plan = align_plan(SharingPlan((0, 0)), heads_of(teacher), architecture_of(teacher.config))
    assert plan.sources == (0, 0)
    assert plan.head_orders == ((), tuple(order.index(head) for head in range(4)))
    with torch.no_grad():
        expected = teacher(WINDOWS).logits
        unaligned = share_attention(twins(tiny_model, kv_heads, order), SharingPlan((0, 0)))
        assert (unaligned(WINDOWS).logits - expected).abs().max() > 0.1
        student = share_attention(teacher, plan)
        torch.testing.assert_close(student(WINDOWS).logits, expected, rtol=0, atol=2e-5)


def test_heads_that_stand_well_are_left_alone(tiny_model: Callable[..., Any]) -> None:
    teacher = twins(tiny_model, 2, [0, 1, 2, 3])
    heads, architecture = heads_of(teacher), architecture_of(teacher.config)
    assert align_plan(SharingPlan((0, 0)), heads, architecture) == SharingPlan((0, 0))
    moved = SharingPlan((0, 0), ((), (1, 0, 2, 3)))
    assert align_plan(moved, heads, architecture) == SharingPlan((0, 0))


def test_plan_of_another_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    teacher = twins(tiny_model, 2, [0, 1, 2, 3])
    with pytest.raises(PlanError, match=whole("3 layers and the model 2")):
        align_plan(SharingPlan((0, 0, 0)), heads_of(teacher), architecture_of(teacher.config))
