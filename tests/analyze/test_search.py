"""The search against all plans there are, and on models in which sharing is free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import VOCAB_SIZE
from tests.wording import whole

from echoatt_exporter import SharingPlan
from echoatt_exporter.analyze.neighbourhood import Neighbourhood
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.search import PlanCandidate, PlanSearch, _front, search_plans
from echoatt_exporter.analyze.similarity import measure_similarity
from echoatt_exporter.errors import AnalysisError

Models = Callable[..., Any]


@pytest.fixture
def windows() -> torch.Tensor:
    """Four windows of 17 token ids."""
    return torch.randint(3, VOCAB_SIZE, (4, 17), generator=torch.Generator().manual_seed(1))


def search(probe: PlanProbe, **asked: Any) -> PlanSearch:
    return search_plans(probe, probe.architecture, probe.teacher.config, **asked)


def every_plan(num_layers: int, start: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All plans of layers of one kind."""
    layer = len(start)
    if layer == num_layers:
        yield start
        return
    for source in range(layer + 1):
        if source == layer or start[source] == source:
            yield from every_plan(num_layers, (*start, source))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_search_comes_near_the_best_of_all_plans(
    seed: int, tiny_model: Models, windows: torch.Tensor
) -> None:
    probe = PlanProbe(tiny_model("llama", seed), windows)
    result = search(probe, ratio=5 / 6)
    assert result.measurements == probe.measurements < 40
    plans = list(every_plan(6))
    assert len(plans) == 203
    costs = {plan: probe.measure(SharingPlan(plan)).kl for plan in plans}
    near = Neighbourhood(result.pair_costs)
    by_sum = near.cheapest_by_sum(5)
    for count in range(1, 6):
        level = [plan for plan in plans if len(SharingPlan(plan).followers) == count]
        summed = min(level, key=near.additive_cost)
        assert near.additive_cost(by_sum[count - 1]) == near.additive_cost(summed)
        found = min(c.cost.kl for c in result.candidates if len(c.plan.followers) == count)
        assert min(costs[plan] for plan in level) <= found <= costs[summed]
        assert found <= 1.1 * min(costs[plan] for plan in level)
    # with as few measurements as can be, what the sums say is measured and nothing else
    least = search(probe, ratio=4 / 6, budget=15 + 3)
    assert [c.plan.sources for c in least.candidates[15:]] == by_sum[1:4]
    # more measurements find the best there is
    all_of_them = search(probe, ratio=0.5, budget=250)
    three = [costs[plan] for plan in plans if len(SharingPlan(plan).followers) == 3]
    assert all_of_them.chosen.cost.kl == min(three)
    assert all_of_them.measurements == 15 + 65 + 90


def test_moves_reach_every_plan_and_only_plans() -> None:
    costs = np.tril(np.random.default_rng(0).random((5, 5)), -1)
    costs[np.triu_indices(5)] = np.nan
    near = Neighbourhood(costs)
    plans = set(every_plan(5))
    level = {near.unshared}
    reached = set(level)
    for _ in range(4):
        level = {moved for plan in level for moved in near.grown(plan)}
        level |= {moved for plan in level for moved in near.swapped(plan)}
        level |= {moved for plan in level for moved in near.swapped(plan)}
        reached |= level
    assert reached == plans
    for plan in plans:
        followers = len(SharingPlan(plan).followers)
        assert all(len(SharingPlan(p).followers) == followers + 1 for p in near.grown(plan))
        assert all(len(SharingPlan(p).followers) == followers for p in near.swapped(plan))
    # layer 1 takes its follower 3 along to where it costs least, which need not be its own source
    costs[3, :3] = [0.3, 0.1, 0.2]
    assert (0, 0, 2, 2, 4) in Neighbourhood(costs).grown((0, 1, 2, 1, 4))


def uniform_layers(tiny_model: Models, *layers: int) -> Any:
    """A model of which some layers attend to all tokens alike."""
    teacher = tiny_model("llama")
    with torch.no_grad():
        for layer in layers:
            teacher.model.layers[layer].self_attn.q_proj.weight.zero_()
    return teacher


def test_free_pairs_are_found(tiny_model: Models, windows: torch.Tensor) -> None:
    probe = PlanProbe(uniform_layers(tiny_model, 1, 2, 4), windows)
    one = search(probe, ratio=0.1)
    assert one.chosen.plan.sources in {(0, 1, 1, 3, 4, 5), (0, 1, 2, 3, 1, 5), (0, 1, 2, 3, 2, 5)}
    assert one.chosen.cost.kl < 1e-7
    free = search(probe, max_kl=1e-6)
    assert free.chosen.plan == SharingPlan((0, 1, 1, 3, 1, 5))
    assert free.chosen.cost.kl < 1e-7
    assert free.chosen.cost.perplexity_ratio == pytest.approx(1, abs=1e-6)
    dearer = search(probe, max_kl=0.05)
    assert len(dearer.chosen.plan.followers) > 2
    assert free.chosen.cost.kl < dearer.chosen.cost.kl <= 0.05
    # as cheap as any with as many, and a plan with one more costs too much
    at = dearer.front.index(dearer.chosen)
    assert all(candidate.cost.kl > 0.05 for candidate in dearer.front[at + 1 :])
    with pytest.raises(AnalysisError, match=r"the cheapest, layer 5 after layer 4, costs 0\.\d"):
        search(PlanProbe(tiny_model("llama"), windows), max_kl=1e-6)


def test_heads_are_lined_up(tiny_model: Models, windows: torch.Tensor) -> None:
    """Layers 1 and 3 attend by position alone, in the same ways, but by other heads."""
    teacher = tiny_model("llama_tied_biased")
    one, other = (teacher.model.layers[layer].self_attn for layer in (1, 3))
    order = [3, 2, 0, 1]  # of layer 3's heads, the one that is as head 0, 1, … of layer 1
    with torch.no_grad():
        for attention in (one, other):
            attention.q_proj.weight.zero_()
            attention.k_proj.weight.zero_()
        one.q_proj.bias.mul_(8)
        other.q_proj.bias.view(4, -1)[order] = one.q_proj.bias.view(4, -1)
        other.k_proj.bias.view(2, -1)[[1, 0]] = one.k_proj.bias.view(2, -1)
    _, heads = measure_similarity(
        teacher, windows, text_digest="", model="tiny", checkpoint_digest="", seed=0
    )
    probe = PlanProbe(teacher, windows)
    plain, aligned = search(probe, ratio=0.1), search(probe, ratio=0.1, head_similarity=heads)
    assert aligned.pair_costs[3, 1] < 1e-7 < 1e-3 < plain.pair_costs[3, 1]
    assert aligned.chosen.plan == SharingPlan(
        (0, 1, 2, 1, 4, 5), ((), (), (), tuple(order), (), ())
    )
    assert probe.measure(aligned.chosen.plan) == aligned.chosen.cost


def test_kinds_budget_progress_and_json(tiny_model: Models, windows: torch.Tensor) -> None:
    probe = PlanProbe(tiny_model("gemma2"), windows)  # sliding, full, sliding, full, …
    seen: list[tuple[int, int, PlanCandidate]] = []
    result = search(
        probe, ratio=0.3, max_ratio=0.67, budget=12, on_measured=lambda *news: seen.append(news)
    )
    assert result.measurements == len(seen) <= 12
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 12) for i in range(len(seen))]
    admissible = {(2, 0), (4, 0), (4, 2), (3, 1), (5, 1), (5, 3)}
    assert {(int(f), int(s)) for f, s in np.argwhere(~np.isnan(result.pair_costs))} == admissible
    counts = [len(candidate.plan.followers) for candidate in result.candidates]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4}
    assert len(result.chosen.plan.followers) == 2
    assert seen[-1][2].plan.sources == (0, 1, 0, 1, 0, 1)
    front = [(c.plan.ratio, c.cost.kl) for c in result.front]
    assert front == sorted(front)
    assert sorted(kl for _, kl in front) == [kl for _, kl in front]
    for candidate in result.candidates:  # none beats one on the front
        for ratio, kl in front:
            assert not (candidate.plan.ratio >= ratio and candidate.cost.kl < kl)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert text == json.dumps(
        search(probe, ratio=0.3, max_ratio=0.67, budget=12).to_dict(), allow_nan=False
    )
    read = json.loads(text)
    assert read["pair_costs"][1] == [None] * 6
    assert read["chosen"]["sources"] == list(result.chosen.plan.sources)
    assert read["chosen"]["kl"] == result.chosen.cost.kl
    assert result.chosen.footprint.context == 64


def test_the_front_holds_what_nothing_beats(tiny_model: Models, windows: torch.Tensor) -> None:
    result = search(PlanProbe(tiny_model("llama"), windows), ratio=0.67, budget=18)
    cheapest = list(result.front)
    assert [len(candidate.plan.followers) for candidate in cheapest] == [1, 2, 3, 4]
    costs = zip(cheapest, [0.2, 0.1, 0.3, 0.3], strict=True)
    made = [replace(c, cost=replace(c.cost, kl=kl)) for c, kl in costs]
    assert _front(made) == (made[1], made[3])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give either a sharing ratio or the most KL"),
        ({"ratio": 0.5, "max_kl": 0.1}, "give either a sharing ratio or the most KL"),
        ({"ratio": 1.0}, "a sharing ratio of 1.0 cannot be; give one between 0 and 1"),
        ({"ratio": 0.9}, "0.9 asks for 5 followers in 6 layers, and at most 4 .* at most 0.67"),
        ({"ratio": 0.5, "max_ratio": 0.8}, "0.8 asks for 5 followers"),
        ({"max_kl": float("nan")}, "a KL of at most nan cannot be"),
        (
            {"ratio": 0.5, "budget": 7},
            "7 measurements are too few: 6 pairs and 2 larger plans .* 8",
        ),
        ({"ratio": 0.5, "context": 65}, "a context of 65 tokens is outside"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    asked: dict[str, Any], message: str, tiny_model: Models, windows: torch.Tensor
) -> None:
    probe = PlanProbe(tiny_model("gemma2"), windows)
    with pytest.raises(AnalysisError, match=whole(message)):
        search(probe, **asked)
    assert probe.measurements == 0
