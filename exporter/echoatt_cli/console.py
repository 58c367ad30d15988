"""What the build commands print: a progress bar on stderr, reports on stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from echoatt_exporter import ExportReport
from echoatt_exporter.analyze.diagram import plan_signs
from echoatt_exporter.parity.table import format_report


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `guard_output`, where rich would end the process."""
        raise

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console`."""
        try:
            super().print(*objects, **options)
        except OSError:
            # What could not be written would come in front of what is printed next
            self.begin_capture()
            self.end_capture()
            raise


# Tables keep their numbers whole where nobody's window sets a width
console = _Console(width=None if sys.stdout.isatty() else 120)

_STEPS = {
    "load": "loading the checkpoint",
    "calibration text": "writing calibration text",
    "scale channels": "scaling channels",
    "widths": "choosing weights to widen",
    "round": "rounding the weights",
    "reference": "running PyTorch for the comparison",
    "trace": "tracing the graph",
    "passes": "rewriting the graph",
    "write": "writing the weights",
    "verify": "comparing with PyTorch",
}


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar over an export's steps; drawn only on a terminal."""
    with Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.fields[count]:>10}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("", total=len(_STEPS), count="")
        names = list(_STEPS)

        def on_step(name: str, done: int, total: int) -> None:
            fraction = done / total if total else 0.0
            bar.update(
                task,
                description=_STEPS[name],
                completed=names.index(name) + fraction,
                count=f"{done}/{total}" if done else "",
            )

        yield on_step


@contextlib.contextmanager
def count_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over something that is counted; drawn only on a terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(title, total=1)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield on_progress


def show_export(report: ExportReport, *, as_json: bool) -> None:
    """Print what an export or a rewrite did."""
    if as_json:
        print(report.to_json())
        return
    show_notes(report.notes)
    show_plan(report.manifest.specification.plan.sources)
    console.print(_passes_table(report))
    if report.parity is not None:
        console.print(format_report(report.parity))
    manifest = report.manifest
    specification = manifest.specification
    size = report.model.stat().st_size + (manifest.weights.bytes or 0)
    verified = "not verified" if manifest.verification is None else "verified"
    console.print(
        f"{report.model}: {specification.dtype}, {report.parameters:,} parameters,"
        f" {size / 1e6:,.1f} MB, {specification.cache_bytes_per_token:,} cache bytes a token,"
        f" {verified}, {report.seconds:.0f} s",
        soft_wrap=True,
        highlight=False,
    )


def show_notes(notes: Sequence[str]) -> None:
    """Print what a user should know of a checkpoint, on stderr, where errors are too."""
    for note in notes:
        print(f"echoatt: note: {note}", file=sys.stderr)


def show_plan(sources: Sequence[int]) -> None:
    """Print a plan as one sign a layer: a source as ●, a follower as its source's number."""
    followers = sum(layer != source for layer, source in enumerate(sources))
    console.print(
        f"plan: {plan_signs(sources)}   ({followers} of {len(sources)} layers follow,"
        f" {followers / len(sources):.0%}; ● computes its own attention)",
        highlight=False,
    )


def _passes_table(report: ExportReport) -> Table:
    """What each pass that found something to do removed (-) or added (+), and why it ran."""
    table = Table(title="graph passes", title_justify="left")
    table.add_column("pass")
    table.add_column("why")
    for name in ("nodes", "parameters", "bytes"):
        table.add_column(name, justify="right")
    for entry in report.passes:
        changes = [
            getattr(entry.after, name) - getattr(entry.before, name)
            for name in ("nodes", "parameters", "bytes")
        ]
        if entry.modified:
            table.add_row(entry.name, entry.why, *(f"{change:+,}" for change in changes))
    return table
