"""The search against all plans there are, and on models in which sharing is free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import VOCAB_SIZE
from tests.wording import whole

from echoatt_exporter import SharingPlan
from echoatt_exporter.analyze.candidates import PlanSearch, front_of
from echoatt_exporter.analyze.compare_maps import measure_similarity
from echoatt_exporter.analyze.cost_model import CostModel
from echoatt_exporter.analyze.match_heads import align_plan
from echoatt_exporter.analyze.neighbourhood import Neighbourhood
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.screen import PairScreen
from echoatt_exporter.analyze.search import screen_for, search_plans
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows

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
    assert result.tried == len(probe.measured) < 70
    plans = list(every_plan(6))
    assert len(plans) == 203
    costs = dict(
        zip(
            plans,
            (cost.kl for cost in probe.measure_all(list(map(SharingPlan, plans)))),
            strict=True,
        )
    )
    for count in range(1, 6):
        level = [plan for plan in plans if len(SharingPlan(plan).followers) == count]
        found = min(c.cost.kl for c in result.candidates if len(c.plan.followers) == count)
        assert found <= 1.1 * min(costs[plan] for plan in level)


def test_the_screen_is_the_second_order_of_what_is_measured(
    tiny_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small changes, and of the second of two tokens alone: nothing is left out then."""
    monkeypatch.setattr("echoatt_exporter.analyze.screen._DRAWS", 16)
    teacher = tiny_model("llama")
    layers = teacher.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.q_proj.weight.mul_(0.05)
        # layer 4 attends as layer 3 does, to nearly the same: they change together
        layers[4].load_state_dict(layers[3].state_dict())
        layers[3].mlp.down_proj.weight.mul_(0.05)
    windows = torch.randint(3, VOCAB_SIZE, (512, 2), generator=torch.Generator().manual_seed(1))
    probe = PlanProbe(teacher, windows)
    screen = screen_for(probe)
    costs = probe.measure_all([SharingPlan(_one(*pair)) for pair in screen.pairs])
    alone = {pair: cost.kl for pair, cost in zip(screen.pairs, costs, strict=True)}
    assert np.log(np.diagonal(screen.gram) / list(alone.values())) == pytest.approx(0, abs=0.2)
    model = CostModel(screen, 6)
    model.learn({_one(*pair): kl for pair, kl in alone.items()})
    for both in ((0, 1, 2, 0, 0, 5), (0, 1, 2, 1, 1, 5), (0, 1, 2, 2, 2, 5)):
        together = probe.measure(SharingPlan(both)).kl
        assert together > 1.4 * (alone[3, both[3]] + alone[4, both[4]])
        assert model.costs([both])[0] == pytest.approx(together, rel=0.15)


def _one(follower: int, source: int) -> tuple[int, ...]:
    return tuple(source if layer == follower else layer for layer in range(6))


def test_the_screen_goes_on_from_where_it_was(
    tiny_model: Models, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echoatt_exporter.analyze.screen._BATCH_TOKENS", 17)
    probe = PlanProbe(tiny_model("gemma2"), windows)
    begun: list[tuple[int, Any]] = []
    whole_screen = screen_for(probe, on_batch=lambda done, total, gram: begun.append((done, gram)))
    assert [done for done, _ in begun] == [1, 2, 3, 4]
    assert set(whole_screen.pairs) == {(2, 0), (4, 0), (4, 2), (3, 1), (5, 1), (5, 3)}
    again = screen_for(probe, begun=begun[1])
    assert np.array_equal(again.gram, whole_screen.gram)
    assert np.array_equal(screen_for(probe, begun=begun[3]).gram, whole_screen.gram)


def test_the_model_adds_pairs_and_what_they_do_together() -> None:
    pairs = ((1, 0), (2, 0), (2, 1))
    gram = np.array([[1.0, 0.5, 0.0], [0.5, 4.0, 0.0], [0.0, 0.0, 2.0]])
    model = CostModel(PairScreen(pairs, gram), 3)
    assert model.costs([(0, 0, 0)]).tolist() == [6.0]
    assert model.costs([(0, 0, 2), (0, 1, 0), (0, 1, 1)]).tolist() == [1.0, 4.0, 2.0]
    assert model.cheapest(2, 2) == [[(0, 0, 2), (0, 1, 1)], [(0, 0, 0)]]
    # measured: four times the estimate, so what it does with another is about twice as much; the
    # other pair of its follower is scaled alike
    model.learn({(0, 1, 0): 16.0})
    assert model.pair_costs[2].tolist()[:2] == pytest.approx([16.0, 8.0])
    assert model.costs([(0, 0, 0)])[0] == pytest.approx(1 * 4 + 16 + 2 * 0.5 * 2 * 2)
    # a plan that is dearer than its pairs say makes them dearer, and what holds one of them
    model.learn({(0, 1, 0): 16.0, (0, 0, 2): 4.0, (0, 0, 0): 40.0})
    assert 35 < model.costs([(0, 0, 0)])[0] < 40  # 24 without
    assert model.pair_costs[2, 0] > 16
    assert model.costs([(0, 0, 1)])[0] > 4 + 8


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


def test_kinds_progress_and_json(tiny_model: Models, windows: torch.Tensor) -> None:
    probe = PlanProbe(tiny_model("gemma2"), windows)  # sliding, full, sliding, full, …
    seen: list[tuple[str, int, int]] = []
    asked = {"ratio": 0.3, "max_ratio": 0.67}
    result = search(probe, **asked, on_step=lambda *news: seen.append(news))
    assert [name for name, _, _ in seen][:2] == ["pairs", "plans"]
    assert all(done <= total for _, done, total in seen)
    admissible = {(2, 0), (4, 0), (4, 2), (3, 1), (5, 1), (5, 3)}
    assert {(int(f), int(s)) for f, s in np.argwhere(~np.isnan(result.pair_costs))} == admissible
    for follower, source in np.argwhere(result.pair_measured):
        plan = SharingPlan(tuple(source if x == follower else x for x in range(6)))
        assert result.pair_costs[follower, source] == pytest.approx(probe.measure(plan).kl)
    counts = [len(candidate.plan.followers) for candidate in result.candidates]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4}
    assert len(result.chosen.plan.followers) == 2
    front = [(c.plan.ratio, c.cost.kl) for c in result.front]
    assert front == sorted(front)
    assert sorted(kl for _, kl in front) == [kl for _, kl in front]
    for candidate in result.candidates:  # none beats one on the front
        for ratio, kl in front:
            assert not (candidate.plan.ratio >= ratio and candidate.cost.kl < kl)
    text = json.dumps(result.to_dict(), allow_nan=False)
    again = search(PlanProbe(tiny_model("gemma2"), windows), **asked)
    assert text == json.dumps(again.to_dict(), allow_nan=False)
    read = json.loads(text)
    assert read["pair_costs"][1] == [None] * 6
    assert read["chosen"]["sources"] == list(result.chosen.plan.sources)
    assert read["chosen"]["kl"] == result.chosen.cost.kl
    assert result.chosen.footprint.context == 64


def test_the_front_holds_what_nothing_beats(tiny_model: Models, windows: torch.Tensor) -> None:
    result = search(PlanProbe(tiny_model("llama"), windows), ratio=0.67)
    cheapest = list(result.front)
    assert [len(candidate.plan.followers) for candidate in cheapest] == [1, 2, 3, 4]
    costs = zip(cheapest, [0.2, 0.1, 0.3, 0.3], strict=True)
    made = [replace(c, cost=replace(c.cost, kl=kl)) for c, kl in costs]
    assert front_of(made) == (made[1], made[3])


# What measuring all pairs and adding them up found on these windows
EXHAUSTIVE = {
    0.25: (0, 1, 0, 0, 4, 0, 6, 7, 8, 9, 10, 11),
    0.42: (0, 1, 0, 0, 4, 4, 6, 4, 0, 9, 10, 11),
}


def test_the_choice_is_as_cheap_as_that_of_an_exhaustive_search(shared_dir: Path) -> None:
    teacher = load_teacher(shared_dir / "models" / "books12", dtype=torch.float32)
    tokenizer = load_tokenizer(shared_dir / "models" / "books12")
    books = sorted((shared_dir / "data" / "books" / "train").iterdir())[:8]
    texts = read_texts(books)
    windows = sample_windows(texts, tokenizer, length=256, count=8)
    _, heads = measure_similarity(
        teacher, windows[:4], text_digest="", model="", checkpoint_digest="", seed=0
    )
    probe = PlanProbe(teacher, windows)
    screen = screen_for(probe, heads)
    for ratio, sources in EXHAUSTIVE.items():
        found = search(probe, ratio=ratio, head_similarity=heads, screen=screen)
        assert int(found.pair_measured.sum()) < len(screen.pairs) / 2
        exhaustive = align_plan(SharingPlan(sources), heads, probe.architecture)
        assert found.chosen.cost.kl <= 1.05 * probe.measure(exhaustive).kl


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give either a sharing ratio or the most KL"),
        ({"ratio": 0.5, "max_kl": 0.1}, "give either a sharing ratio or the most KL"),
        ({"ratio": 1.0}, "a sharing ratio of 1.0 cannot be; give one between 0 and 1"),
        ({"ratio": 0.9}, "0.9 asks for 5 followers in 6 layers, and at most 4 .* at most 0.67"),
        ({"ratio": 0.5, "max_ratio": 0.8}, "0.8 asks for 5 followers"),
        ({"max_kl": float("nan")}, "a KL of at most nan cannot be"),
        ({"ratio": 0.5, "context": 65}, "a context of 65 tokens is outside"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    asked: dict[str, Any], message: str, tiny_model: Models, windows: torch.Tensor
) -> None:
    probe = PlanProbe(tiny_model("gemma2"), windows)
    with pytest.raises(AnalysisError, match=whole(message)):
        search(probe, **asked)
    assert len(probe.measured) == 0
