"""The analysis as one HTML page that stands alone: no script, and nothing fetched or beside it."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from echoatt_exporter.analyze.candidates import PlanSearch
from echoatt_exporter.analyze.diagram import plan_signs, plan_svg
from echoatt_exporter.analyze.findings import AnalysisReport
from echoatt_exporter.analyze.pictures import (
    image_bytes,
    similarity_figure,
    times,
    trade_off_figure,
)
from echoatt_exporter.analyze.probe import RUIN
from echoatt_exporter.analyze.publish import FRONT, PLAN
from echoatt_runtime.contract import SharingPlan

_TEMPLATE = "report.html.j2"


def render_report(report: AnalysisReport) -> str:
    """The page as HTML; every text in it, names and paths included, is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        kl=_kl,
        times=times,
        perplexity=_perplexity,
        percent=_percent,
        count=_count,
        signs=plan_signs,
    )
    search = report.search
    return environment.get_template(_TEMPLATE).render(
        report=report,
        search=search,
        diagram=plan_svg(report.chosen.plan, _in_words(report.chosen.plan)),
        tiles=_tiles(report),
        steps=_steps(report),
        plan_path=report.out / PLAN,
        front_path=report.out / FRONT,
        similarity_images=_images(lambda dark: similarity_figure(report.similarity, dark=dark)),
        spread=_spread(report),
        ranking=_ranking(report),
        alignment=report.alignment,
        facts=_facts(report),
        **({} if search is None else _search_parts(report, search)),
    )


def _images(draw: Callable[[bool], Figure]) -> dict[str, str]:
    """A picture for light and one for dark pages, as data URLs.

    An SVG in an image element keeps its ids to itself, which inline SVGs would share.
    """
    return {
        scheme: "data:image/svg+xml;base64,"
        + base64.b64encode(image_bytes(draw(scheme == "dark"), "svg")).decode()
        for scheme in ("light", "dark")
    }


def _in_words(plan: SharingPlan) -> str:
    followers = ", ".join(f"{layer} follows {plan.sources[layer]}" for layer in plan.followers)
    return f"{plan.num_layers} layers; {followers or 'none follows another'}"


# --- numbers for readers --------------------------------------------------------------------------


def _kl(value: float) -> str:
    return "<0.0001" if 0 < value < 0.00005 else f"{value:.4f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


# --- the sections ---------------------------------------------------------------------------------


def _tiles(report: AnalysisReport) -> list[dict[str, str]]:
    footprint = report.chosen.footprint
    cache, before = (one.cache_bytes_per_token for one in (footprint.student, footprint.teacher))
    return [
        {
            "name": "parameters",
            "value": f"-{footprint.parameters_removed_share:.1%}",
            "note": f"{footprint.parameters:,} of {footprint.teacher.parameters:,}",
        },
        {
            "name": "cache",
            "value": f"-{1 - cache / before:.0%}",
            "note": f"{cache:,.0f} of {before:,.0f} bytes a token",
        },
        {
            "name": "estimated decode speed",
            "value": times(footprint.estimated_speed),
            "note": f"at a context of {footprint.context:,} tokens",
        },
    ]


def _spread(report: AnalysisReport) -> dict[str, str]:
    stds = report.similarity.std[np.triu_indices(len(report.importance), k=1)]
    typical, largest = (np.median(stds), stds.max()) if stds.size else (0.0, 0.0)
    return {"typical": f"{typical:.3f}", "largest": f"{largest:.3f}"}


def _ranking(report: AnalysisReport) -> list[dict[str, Any]]:
    """The layers, the most important (least like the others) first."""
    similarity, plan = report.similarity, report.chosen.plan
    layers = range(len(report.importance))
    without_first_L = similarity.mean_without_first.sum(axis=1) - 1
    others = np.where(np.eye(len(layers), dtype=bool), -np.inf, similarity.mean)
    return [
        {
            "layer": layer,
            "role": f"follows {plan.sources[layer]}"
            if plan.is_follower(layer)
            else "lends its attention"
            if layer in plan.shared_sources
            else "own attention",
            "mean": report.importance[layer],
            "percent": round(100 * min(1.0, max(0.0, report.importance[layer])), 1),
            "without_first": float(without_first_L[layer]) / max(1, len(layers) - 1),
            "closest": int(others[layer].argmax()) if len(layers) > 1 else "",
        }
        for layer in sorted(layers, key=lambda layer: report.importance[layer])
    ]


def _steps(report: AnalysisReport) -> list[dict[str, str]]:
    """The commands that go from here to a verified bundle."""
    out, model, texts = report.out, report.model_dir, report.text_paths
    student, fitted, healed = (
        out.with_name(f"{out.name}-{kind}") for kind in ("student", "fitted", "healed")
    )

    def command(line: str, *words: str | Path) -> str:
        return " ".join([line, *(shlex.quote(str(word)) for word in words)])

    share = command("echoatt share", model, student, "--plan", out / PLAN)
    refit = command("echoatt refit", student, fitted, "--teacher", model, "--text", *texts)
    distill = command("echoatt distill --teacher", model, "--student", fitted, "--text", *texts)
    trained = healed / "student"  # where `echoatt distill` leaves it
    evaluate = command("echoatt evaluate", trained, "--against", model)
    commands = {
        "Copy: build the student": share,
        "Re-fit it: minutes, in closed form": refit,
        "Adjust: heal it by distillation": command(distill, "--out", healed),
        "Judge it on text that it was neither chosen nor trained on": f"{evaluate} --text TEXT",
        "Export it as a verified ONNX bundle": command("echoatt-export", trained, f"{healed}.onnx"),
    }
    return [{"what": what, "command": command} for what, command in commands.items()]


def _counts(by_layer: Sequence[int]) -> str:
    """Each number once: nearly always there is one for all layers."""
    return " or ".join(map(str, dict.fromkeys(by_layer)))


def _facts(report: AnalysisReport) -> list[dict[str, str]]:
    similarity, shape = report.similarity, report.architecture
    kinds = ", ".join(
        f"{shape.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(shape.layer_kinds)
    )
    texts = ", ".join(map(str, report.text_paths))
    facts = {
        "model": str(report.model_dir),
        "shape": f"{shape.family}, {shape.num_layers} layers ({kinds} attention),"
        f" {_counts(shape.query_heads)} query heads, {_counts(shape.kv_heads)} key/value heads"
        f" of {_counts(shape.head_dims)}",
        "checkpoint": f"sha256 {similarity.checkpoint_digest}",
        "text": f"{texts} ({report.documents:,} documents, sha256 {similarity.text_digest})",
        "similarity": f"{similarity.samples:,} samples of exactly {similarity.length:,} tokens, not"
        f" padded, seed {similarity.seed}",
        "costs": f"{report.calibration_windows:,} windows of {similarity.length:,} tokens"
        " from the same text; KL teacher to student of the next token's distribution",
        "versions": ", ".join(f"{name} {found}" for name, found in similarity.versions.items()),
        "made": f"{report.created}, in {report.seconds:,.0f} s",
    }
    return [{"name": name, "value": value} for name, value in facts.items()]


def _search_parts(report: AnalysisReport, search: PlanSearch) -> dict[str, Any]:
    return {
        "trade_off_images": _images(lambda dark: trade_off_figure(search, dark=dark)),
        "pair_columns": range(report.architecture.num_layers - 1),
        "pair_rows": _pair_rows(report.chosen.plan, search),
        "ruin": RUIN if any(one.cost.ruined for one in search.front) else None,
        "ruin_kl": math.log(RUIN),
    }


def _pair_rows(plan: SharingPlan, search: PlanSearch) -> list[dict[str, Any]]:
    """The matrix of pair costs: a row a follower, with nothing right of its diagonal.

    Heat goes with the logarithm, since costs span orders of magnitude.
    """
    pair_costs_LL = search.pair_costs
    logs_LL = np.log(np.maximum(pair_costs_LL, 1e-9))
    low, high = np.nanmin(logs_LL), np.nanmax(logs_LL)

    def cell(follower: int, source: int) -> dict[str, Any]:
        cost = float(pair_costs_LL[follower, source])
        if math.isnan(cost):
            return {"text": "" if source >= follower else "·"}
        warmth = (logs_LL[follower, source] - low) / ((high - low) or 1)
        return {
            "kl": cost,
            "text": _thousandths(cost),
            "heat": round(5 + 40 * float(warmth)),  # letters stay readable, on dark pages too
            "marks": " ".join(
                mark
                for mark, holds in (
                    ("used", plan.sources[follower] == source),
                    ("estimated", not search.pair_measured[follower, source]),
                )
                if holds
            ),
        }

    layers = range(plan.num_layers)
    return [
        {"layer": layer, "cells": [cell(layer, source) for source in layers[:-1]]}
        for layer in layers[1:]
    ]


def _thousandths(value: float) -> str:
    thousandths = 1000 * value
    return f"{thousandths:.2g}" if thousandths < 10 else f"{thousandths:,.0f}"
