"""Moving heads: the model stays the same, the way back is exact, followers read the right ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.share.reference import share_by_hand
from tests.tiny_models import TINY_MODELS, every_family
from tests.wording import whole

from echoatt_exporter import EchoAttForCausalLM, SharingPlan, load_shared, share_attention
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.families import FAMILIES
from echoatt_exporter.share.align_heads import reorder_heads
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]
Check = Callable[[torch.Tensor, torch.Tensor], None]

# A cycle, so that it is not its own inverse
ALONE = (2, 0, 3, 1)
# With six heads in three pairs of keys and values: pairs in a cycle, and one turned round
PAIRED = (4, 5, 1, 0, 2, 3)
SIX = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}


def _order(model: Any) -> tuple[int, ...]:
    return ALONE if architecture_of(model.config).query_heads[0] == 4 else PAIRED


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(head) for head in range(len(order))]


@pytest.fixture
def teacher_of(tiny_model: Models) -> Models:
    """`teacher_of(family)` with enough key/value groups to tell an order from its inverse."""

    def build(name: str) -> Any:
        return tiny_model(name, **(SIX if TINY_MODELS[name].grouped else {}))

    return build


@every_family
@torch.no_grad()
def test_reordered_heads_compute_the_same_and_the_inverse_is_exact(
    family: str, teacher_of: Models, tokens: torch.Tensor, assert_close: Check
) -> None:
    teacher = teacher_of(family)
    before, expected = copy.deepcopy(teacher.state_dict()), teacher(tokens).logits
    order = _order(teacher)

    reorder_heads(teacher, 2, order)

    changed = {n for n, w in teacher.state_dict().items() if not torch.equal(w, before[n])}
    assert changed
    prefix = f"{FAMILIES[TINY_MODELS[family].family].layers}.2."
    assert all(name.startswith(prefix) for name in changed)
    assert_close(teacher(tokens).logits, expected)

    reorder_heads(teacher, 2, _inverse(order))

    assert all(torch.equal(w, before[n]) for n, w in teacher.state_dict().items())
    assert torch.equal(teacher(tokens).logits, expected)


@every_family
@torch.no_grad()
def test_a_followers_order_says_which_head_reads_which_probabilities(
    family: str, teacher_of: Models, plan_for: Models, tokens: torch.Tensor, assert_close: Check
) -> None:
    teacher, unordered = teacher_of(family), plan_for(family)
    order, last = _order(teacher), unordered.followers[-1]
    orders = tuple(order if layer == last else () for layer in range(6))

    student = share_attention(teacher, SharingPlan(unordered.sources, orders))

    by_hand = share_by_hand(teacher_of(family), unordered.sources, {last: order})
    assert_close(student(tokens).logits, by_hand(tokens).logits)
    plain = share_attention(teacher_of(family), unordered)
    assert (student(tokens).logits - plain(tokens).logits).abs().max() > 0.05


@torch.no_grad()
def test_a_saved_student_has_the_order_in_its_weights(
    tiny_model: Models, tokens: torch.Tensor, tmp_path: Any
) -> None:
    plan = SharingPlan((0, 1, 1, 3, 4, 5), ((), (), (3, 2, 0, 1), (), (), ()))
    student: EchoAttForCausalLM = share_attention(tiny_model("llama"), plan)
    student.save_pretrained(tmp_path)
    for asked in (None, plan, "2:1"):
        loaded = load_shared(tmp_path, asked)
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize(
    ("layer", "order", "message"),
    [
        (6, (0, 1, 2, 3), "layer 6 does not exist; there are 6"),
        (-1, (0, 1, 2, 3), "layer -1 does not exist"),
        (2, (0, 1, 2), "layer 2's head order has 3 heads and the model 4"),
        (2, (0, 1, 1, 3), r"\[0, 1, 1, 3\] does not name each of the heads 0 to 3 once"),
        (2, (0, 2, 1, 3), "splits a key/value group"),
    ],
)
def test_a_wrong_order_is_refused_and_changes_nothing(
    layer: int, order: tuple[int, ...], message: str, tiny_model: Models
) -> None:
    teacher = tiny_model("llama")
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(PlanError, match=whole(message)):
        reorder_heads(teacher, layer, order)
    if layer == 2:
        plan = SharingPlan((0, 1, 1, 3, 4, 5), ((), (), order, (), (), ()))
        with pytest.raises(PlanError, match=whole(message)):
            share_attention(teacher, plan)
    assert all(torch.equal(w, before[n]) for n, w in teacher.state_dict().items())
