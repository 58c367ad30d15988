"""Pairs fitted before there is a plan, and plans judged by what they cost then."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.tiny_models import build_tiny_model, every_family, tiny_plan

from echoatt_exporter import AnalysisError, SharingPlan, TextError
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.run import analyze_model
from echoatt_exporter.analyze.screen import screen_pairs
from echoatt_exporter.analyze.search import pair_plans
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.families import family_of
from echoatt_exporter.refit.pair_fits import fit_pairs
from echoatt_exporter.refit.refit import ALONE, refit_student
from echoatt_exporter.share.apply import share_attention


def _windows(count: int, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(seed))


@every_family
@torch.no_grad()
def test_a_plan_costs_what_its_fitted_student_does(family: str) -> None:
    """The student is fitted by other code, on its own modules."""
    teacher, plan = build_tiny_model(family), tiny_plan(family)
    windows, held_out = _windows(24), _windows(4, seed=5)
    fits = fit_pairs(teacher, windows, [plan])
    cost = PlanProbe(teacher, held_out, fits=fits).measure(plan)
    unfitted = PlanProbe(teacher, held_out).measure(plan)
    assert cost.kl < unfitted.kl
    student = share_attention(copy.deepcopy(teacher), plan)
    layers = family_of(teacher.config).layers_of(student.decoder)
    for layer in plan.followers:
        attention = family_of(teacher.config).attention_of(layers[layer])
        attention.o_proj = fits.of(layer, plan.sources[layer], attention.o_proj)
    logits = [model(held_out).logits.log_softmax(-1) for model in (teacher, student)]
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert cost.kl == pytest.approx(kl, rel=1e-3)


@torch.no_grad()
def test_heads_in_another_order_are_fitted_in_it() -> None:
    teacher = build_tiny_model("llama")
    plan = SharingPlan((0, 1, 1, 3, 4, 5), ((), (), (3, 2, 0, 1), (), (), ()))
    windows, held_out = _windows(48), _windows(4, seed=5)
    fits = fit_pairs(teacher, windows, [plan])
    student = share_attention(copy.deepcopy(teacher), plan)
    report = refit_student(student, teacher, windows, held_out, dtype=torch.float32)
    assert report.steps[0].fits[0].part == ALONE
    cost = PlanProbe(teacher, held_out, fits=fits).measure(plan)
    assert cost.kl == pytest.approx(report.steps[0].kl, rel=1e-3)


def test_the_screen_sees_what_pairs_cost_when_they_are_fitted() -> None:
    teacher = build_tiny_model("llama")
    plans = pair_plans(architecture_of(teacher.config))
    windows = _windows(96)
    fits = fit_pairs(teacher, windows, plans)
    fitted, plain = (
        screen_pairs(teacher, _windows(8, seed=5), plans, fits=one) for one in (fits, None)
    )
    assert fitted.pairs == plain.pairs
    better = fitted.gram.diagonal() < plain.gram.diagonal()
    assert better.mean() > 0.9
    assert fitted.gram.trace() < 0.8 * plain.gram.trace()


def test_one_plan_of_each_source_is_run_beside_the_others() -> None:
    """In one run layer 2 follows layer 0, layer 1, and itself, with projections of its own."""
    teacher = build_tiny_model("llama")
    plans = [SharingPlan((0, 1, source, 3, 4, 5)) for source in (0, 1, 2)]
    fits = fit_pairs(teacher, _windows(24), plans)
    probe = PlanProbe(teacher, _windows(4, seed=5), fits=fits)
    together = [cost.kl for cost in probe.measure_all(plans)]
    alone = [PlanProbe(teacher, _windows(4, seed=5), fits=fits).measure(p).kl for p in plans]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-9)
    assert together[2] == pytest.approx(0, abs=1e-6)
    assert len({round(kl, 6) for kl in together}) == 3


def test_a_trained_model_is_searched_by_what_fitted_plans_cost(
    stories260k: Path, shared_dir: Path, tmp_path: Path
) -> None:
    text = [shared_dir / "data" / "tinystories.txt"]
    options = {"ratio": 0.4, "length": 128, "samples": 48, "calibration_windows": 8}
    reports = {
        refit: analyze_model(stories260k, text, tmp_path / str(refit), refit=refit, **options)
        for refit in (False, True)
    }
    assert reports[True].chosen.cost.kl < 0.8 * reports[False].chosen.cost.kl
    assert reports[True].selection.endswith("40%, re-fitted")
    page = (tmp_path / "True" / "report.html").read_text()
    assert "each follower&#39;s attention re-fitted" in page
    options["calibration_windows"] = 48
    with pytest.raises(TextError, match="a re-fit takes others"):
        analyze_model(stories260k, text, tmp_path / "all", refit=True, **options)
    with pytest.raises(AnalysisError, match="--refit does not go with the method paper"):
        analyze_model(stories260k, text, tmp_path / "paper", refit=True, method="paper")
