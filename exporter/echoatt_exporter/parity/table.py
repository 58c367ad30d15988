"""A parity report as a table for the terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from echoatt_exporter.parity.report import CaseReport, ParityReport, Tolerance


def format_report(report: ParityReport) -> RenderableType:
    """The report: a row for each case, then what was allowed and where a fault begins."""
    table = Table(title=f"PyTorch against the {report.dtype} bundle on {report.provider}")
    table.add_column("case")
    for heading in (
        "max |Δ|", "max |Δ| / spread", "rms Δ / spread", "mean KL", "max KL", "top-1",
        "diverges at", "NaN",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("")
    for case in report.cases:
        table.add_row(*_cells(case))
    lines = [Text(_allowed(tolerance)) for tolerance in report.tolerances]
    if not report.passed:
        lines.append(Text(f"fails in {report.worst.name}: {report.worst.finding}", style="red"))
        lines.append(Text(f"diverges: {report.divergence}", style="red"))
    return Group(table, *lines)


def _cells(case: CaseReport) -> list[str | Text]:
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
        Text("pass", style="green") if case.passed else Text("FAIL", style="bold red"),
    ]


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "∞"


def _allowed(tolerance: Tolerance) -> str:
    basis = "" if tolerance.basis == "fixed" else f"; {tolerance.basis}"
    return (
        f"allowed in {tolerance.name}: max |Δ| {tolerance.max_error:.2g} and rms Δ"
        f" {tolerance.rms_error:.2g} of the logits' spread (their standard deviation){basis}"
    )
