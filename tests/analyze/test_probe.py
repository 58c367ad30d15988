"""The probe against real students, on every family."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, every_family
from tests.wording import whole
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from echoatt_exporter import SharingPlan, share_attention
from echoatt_exporter.analyze import divergence, sweep
from echoatt_exporter.analyze import probe as probe_module
from echoatt_exporter.analyze.measured import Measured
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.search import screen_for
from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]


@pytest.fixture
def windows() -> torch.Tensor:
    """Five windows of 17 token ids."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB_SIZE, (5, 17), generator=generator)


@torch.no_grad()
def by_hand(teacher: Any, student: Any, windows: torch.Tensor) -> tuple[float, float, float]:
    """KL(teacher‖student), its standard error, and the student's perplexity."""
    expected = teacher(windows).logits.double().log_softmax(-1)
    actual = student(windows).logits.double().log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean(1)
    loss = F.nll_loss(actual[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return kl.mean().item(), kl.std().item() / math.sqrt(len(kl)), math.exp(loss.item())


@every_family
def test_a_measured_plan_equals_the_student_it_makes(
    family: str, tiny_model: Models, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_LOGITS_AT_ONCE", 10 * VOCAB_SIZE)  # in several pieces
    monkeypatch.setattr(probe_module, "_BATCH_TOKENS", 34)  # two windows
    monkeypatch.setattr(sweep, "_TOKENS_AT_ONCE", 68)  # two states
    teacher = tiny_model(family)
    plan = SharingPlan(TINY_MODELS[family].sources)
    late = list(range(6))  # one follower behind many layers that may be left out
    late[5] = max(s for s in range(5) if plan.sources[s] == s and _same_kind(teacher, s, 5))
    probe = PlanProbe(teacher, windows)
    orders = tuple((3, 2, 0, 1) if layer in plan.followers else () for layer in range(6))
    ordered = SharingPlan(plan.sources, orders)
    asked_for = (plan, SharingPlan(tuple(late)), ordered)
    for asked, cost in zip(asked_for, probe.measure_all(asked_for), strict=True):
        student = share_attention(copy.deepcopy(teacher), asked)
        kl, error, perplexity = by_hand(teacher, student, windows)
        assert kl > 1e-3
        assert cost.kl == pytest.approx(kl, abs=1e-5)
        assert cost.kl_standard_error == pytest.approx(error, abs=1e-5)
        assert cost.perplexity == pytest.approx(perplexity, rel=1e-5)
    unshared = probe.measure(SharingPlan.unshared(6))
    assert unshared.kl <= 1e-7
    assert unshared.perplexity == pytest.approx(by_hand(teacher, teacher, windows)[2], rel=1e-5)
    assert unshared.perplexity == unshared.teacher_perplexity


def _same_kind(teacher: Any, one: int, other: int) -> bool:
    kinds = getattr(teacher.config, "layer_types", None) or ["same"] * 6
    return bool(kinds[one] == kinds[other])


@pytest.mark.parametrize("family", ["llama", "phi3_full", "gpt_neox", "gemma2"])
def test_head_orders_equal_reordering_the_probabilities_by_hand(
    family: str, tiny_model: Models, windows: torch.Tensor
) -> None:
    teacher = tiny_model(family)
    sources, order = TINY_MODELS[family].sources, (3, 2, 0, 1)  # groups swapped, and one inside
    latest: dict[int, torch.Tensor] = {}

    def attention(
        module: Any, query: Any, key: Any, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        layer = module.layer_idx
        _, latest[layer] = eager(module, query, key, value, mask, **kwargs)
        read_BHST = latest[sources[layer]]
        if sources[layer] != layer:
            own = torch.empty_like(read_BHST)
            for head_of_source, head in enumerate(order):
                own[:, head] = read_BHST[:, head_of_source]
            read_BHST = own
        repeated = value.repeat_interleave(read_BHST.shape[1] // value.shape[1], dim=1)
        return (read_BHST @ repeated).transpose(1, 2).contiguous(), None

    AttentionInterface.register("ordered_by_hand", attention)
    AttentionMaskInterface.register("ordered_by_hand", eager_mask)
    student = copy.deepcopy(teacher)
    student.set_attn_implementation("ordered_by_hand")
    kl, _, perplexity = by_hand(teacher, student, windows)
    orders = tuple(order if layer != source else () for layer, source in enumerate(sources))
    probe = PlanProbe(teacher, windows)
    cost = probe.measure(SharingPlan(sources, orders))
    assert cost.kl == pytest.approx(kl, abs=1e-5)
    assert cost.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert abs(cost.kl - probe.measure(SharingPlan(sources)).kl) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_plans_run_together_or_alone_cost_the_same(
    family: str, tiny_model: Models, windows: torch.Tensor
) -> None:
    teacher = tiny_model(family)
    sources = [(0, 1, 2, 3, 4, 3), (0, 1, 2, 1, 4, 5), (0, 1, 0, 1, 4, 5), (0, 1, 0, 1, 0, 1)]
    plans = [SharingPlan(one) for one in sources]
    together = PlanProbe(teacher, windows)
    costs = together.measure_all([*plans, plans[0]])
    for plan, cost in zip(plans, costs, strict=False):
        alone = PlanProbe(teacher, windows).measure(plan)
        assert cost.kl == pytest.approx(alone.kl, rel=1e-5)
        assert cost.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
        assert together.measure(plan) == cost
    assert costs[-1] == costs[0]
    assert len(together.measured) == 4


def test_a_few_windows_first_and_then_the_others(
    tiny_model: Models, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_BATCH_TOKENS", 17)  # one window
    monkeypatch.setattr(probe_module, "_FEW_TOKENS", 40)  # three of them
    probe = PlanProbe(tiny_model("llama"), windows)
    plans = [SharingPlan((0, 1, 1, 3, 4, 5)), SharingPlan((0, 1, 2, 3, 3, 5))]
    runs: list[tuple[int, int]] = []
    few = probe.measure_all(plans, few=True, on_run=lambda *news: runs.append(news))
    assert runs == [(2, 6), (4, 6), (6, 6)]
    fewer = PlanProbe(tiny_model("llama"), windows[:3]).measure_all(plans)
    assert few == fewer
    assert [cost.windows for cost in few] == [3, 3]
    runs.clear()
    whole_costs = probe.measure_all(plans, on_run=lambda *news: runs.append(news))
    assert runs == [(2, 4), (4, 4)]  # the other two windows
    assert [cost.windows for cost in whole_costs] == [5, 5]


def test_measurements_come_back_from_the_file_as_they_were(
    tiny_model: Models, windows: torch.Tensor, tmp_path: Path
) -> None:
    teacher, path = tiny_model("llama"), tmp_path / "measured.json"
    plans = [SharingPlan((0, 1, 1, 3, 4, 5)), SharingPlan((0, 0, 2, 3, 3, 5))]
    ordered = SharingPlan(plans[0].sources, ((), (), (3, 2, 0, 1), (), (), ()))
    measured = Measured(path)
    costs = PlanProbe(teacher, windows, measured).measure_all([*plans, ordered])
    measured.keep(now=True)
    assert [file.name for file in tmp_path.iterdir()] == ["measured.json"]
    runs: list[tuple[int, int]] = []
    again = PlanProbe(teacher, windows, Measured(path))
    assert again.measure_all([*plans, ordered], on_run=lambda *news: runs.append(news)) == costs
    assert runs == []


def test_the_teacher_is_left_as_it_was(tiny_model: Models, windows: torch.Tensor) -> None:
    teacher = tiny_model("phi3").train()
    teacher.model.layers[3].eval()  # frozen, as some do
    teacher.model.layers[2].requires_grad_(False)
    learning = [weight.requires_grad for weight in teacher.parameters()]
    modes = [module.training for module in teacher.modules()]
    modules, before = dict(teacher.named_modules()), copy.deepcopy(teacher.state_dict())
    probe = PlanProbe(teacher, windows)
    probe.measure(SharingPlan((0, 1, 1, 1, 4, 4)))
    screen_for(probe)
    with pytest.raises(PlanError, match="layer 3 uses layer 4, which is not earlier"):
        probe.measure(SharingPlan((0, 1, 1, 4, 4, 4)))
    probe._outputs[0] = probe._outputs[0][..., 1:]  # fails in the middle of a measurement
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        probe.measure(SharingPlan((0, 1, 1, 1, 4, 1)))
    assert dict(teacher.named_modules()) == modules
    assert [module.training for module in teacher.modules()] == modes
    assert [weight.requires_grad for weight in teacher.parameters()] == learning
    assert all(weight.grad is None for weight in teacher.parameters())
    assert teacher.config._attn_implementation == "sdpa"
    after = teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_losses_that_are_no_number_are_refused(tiny_model: Models, windows: torch.Tensor) -> None:
    teacher = tiny_model("llama")
    probe = PlanProbe(teacher, windows)
    torch.nn.init.constant_(teacher.lm_head.weight, math.inf)
    with pytest.raises(AnalysisError, match="loss is not a number"):
        probe.measure(SharingPlan((0, 1, 1, 1, 4, 4)))
    with pytest.raises(AnalysisError, match="loss is not a number"):
        PlanProbe(teacher, windows)


def test_bad_windows_are_refused(tiny_model: Models) -> None:
    teacher = tiny_model("llama")
    for windows, message in [
        (torch.zeros(1, 9, dtype=torch.int64), r"shape \[1, 9\] tell nothing of the spread"),
        (torch.zeros(2, 65, dtype=torch.int64), "65 tokens are longer than the model's context"),
        (torch.full((2, 9), VOCAB_SIZE), "token id 61 is outside the model's vocabulary of 61"),
    ]:
        with pytest.raises(AnalysisError, match=whole(message)):
            PlanProbe(teacher, windows)
