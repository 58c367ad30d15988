"""The files of an analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echoatt_exporter.analyze.candidates import PlanCandidate
from echoatt_exporter.analyze.findings import AnalysisReport
from echoatt_exporter.analyze.pictures import image_bytes, similarity_figure
from echoatt_exporter.analyze.publish import (
    FRONT,
    PAGE,
    PICTURE,
    PLAN,
    SEARCH,
    SIMILARITY,
    WITHOUT_FIRST,
)
from echoatt_exporter.analyze.report import render_report

SEARCH_FORMAT = "echoatt-search/2"


def save_analysis(report: AnalysisReport, folder: Path) -> None:
    """Write all files of an analysis.

    Args:
        report: What was found.
        folder: An empty one.

    Raises:
        OSError: A file cannot be written.
        AnalysisError: `similarity.json` cannot be written.
    """
    similarity = report.similarity
    similarity.save(folder / SIMILARITY)
    (folder / PICTURE).write_bytes(image_bytes(similarity_figure(similarity), "png"))
    _write_json(folder / PLAN, _plan_data(report, report.chosen))
    if report.sink is not None:
        _write_json(folder / WITHOUT_FIRST, _plan_data(report, report.sink.beside))
    if report.search is not None:
        data = {"format": SEARCH_FORMAT, **report.origin(), **report.search.to_dict()}
        _write_json(folder / SEARCH, data)
        (folder / FRONT).mkdir()
        for candidate in report.search.front:
            plan = candidate.plan
            name = f"{len(plan.followers):02}-of-{plan.num_layers}.json"
            _write_json(folder / FRONT / name, _plan_data(report, candidate))
    (folder / PAGE).write_text(render_report(report), encoding="utf-8")


def _plan_data(report: AnalysisReport, candidate: PlanCandidate) -> dict[str, Any]:
    """A plan file, with what the plan is for and costs beside it."""
    cost = candidate.cost
    return {
        **json.loads(candidate.plan.to_json()),
        "method": report.method,
        "ratio": candidate.plan.ratio,
        "kl": cost.kl,
        "kl_standard_error": cost.kl_standard_error,
        "perplexity_ratio": cost.perplexity_ratio,
        **report.origin(),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
