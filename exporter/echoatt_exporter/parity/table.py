"""A parity report as a table for the terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from echoatt_exporter.parity.report import CaseReport, Difference, ParityReport


def format_report(report: ParityReport) -> RenderableType:
    """The report: a row for each case, then what was allowed and where a fault begins."""
    weights = "" if report.unrounded is None else ", rounded weights on both sides,"
    table = Table(title=f"PyTorch{weights} against the {report.dtype} bundle on {report.provider}")
    table.add_column("case")
    for heading in (
        "max |Δ|", "max |Δ| / spread", "rms Δ / spread", "mean KL", "max KL", "top-1",
        "diverges at", "NaN", "of what is allowed",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("")
    for case in report.cases:
        table.add_row(*_cells(case), *_judgement(case))
    lines = [
        Text(
            f"{report.method}; PyTorch loses {report.typical:.0e} of the logits' spread (their"
            " standard deviation) at most positions"
        )
    ]
    if report.unrounded is not None:
        table.add_section()
        table.add_row(*_cells(report.unrounded), "", "not judged")
        lines.append(Text(_rounding_cost(report.unrounded)))
    if not report.passed:
        lines.append(Text(f"fails in {report.worst.name}: {report.worst.finding}", style="red"))
        lines.append(Text(f"diverges: {report.divergence}", style="red"))
    return Group(table, *lines)


def _cells(case: Difference) -> list[str | Text]:
    first = case.first_diverging_token
    return [
        case.name,
        _number(case.max_abs_error),
        _number(case.max_error),
        _number(case.rms_error),
        _number(case.mean_kl),
        _number(case.max_kl),
        f"{case.top1_agreement:.1%}",
        "never" if first is None else f"token {first}",
        str(case.nan_count),
    ]


def _judgement(case: CaseReport) -> list[str | Text]:
    verdict = Text("pass", style="green") if case.passed else Text("FAIL", style="bold red")
    return [f"{case.excess:.2g}" if math.isfinite(case.excess) else "∞", verdict]


def _rounding_cost(difference: Difference) -> str:
    return (
        f"rounding the weights costs, in {difference.rows} tokens of real or random text: KL"
        f" {difference.mean_kl:.2g}, the same most likely token in"
        f" {difference.top1_agreement:.0%}, {difference.rms_error:.2g} of the logits' spread"
    )


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "∞"
