"""`echoatt analyze MODEL_DIR --text FILE… --out DIR`: which layers may share, and a plan."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echoatt_exporter.analyze.candidates import PlanCandidate
    from echoatt_exporter.analyze.findings import AnalysisReport
    from echoatt_exporter.analyze.run import OnStep

HELP = "measure which layers may share attention, and choose a sharing plan"

# Of lines of progress where there is no terminal
_SECONDS_BETWEEN_LINES = 20

_METHODS = ("cost", "paper", "threshold")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="a Hugging Face directory of a supported family"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt, .md or .jsonl files (field text), or folders of them",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for report, plan and numbers"
    )
    parser.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of a sample (default 512)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=200,
        metavar="N",
        help="samples for the similarity (default 200, or what the text holds)",
    )
    parser.add_argument(
        "--calibration-windows",
        type=int,
        default=16,
        metavar="N",
        help="how many of the samples costs are measured on (default 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (default 0)")
    _add_choice_arguments(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--force", action="store_true", help="replace an earlier analysis")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings"
    )


def _add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default="cost",
        help="cost: search plans by their KL to the model on the text (default); paper: cut the"
        " layers' mean similarity at its largest gap; threshold: share where similar enough",
    )
    parser.add_argument(
        "--ratio",
        type=float,
        metavar="R",
        help="followers / layers (default 0.25 for cost, the gap's for paper)",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="share as much as costs at most X nats a token (cost only)",
    )
    parser.add_argument(
        "--min-similarity",
        type=float,
        metavar="X",
        help="least similarity of a follower to its source, 0 to 1 (threshold only)",
    )
    parser.add_argument(
        "--no-align", action="store_true", help="do not line followers' heads up with sources'"
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="judge plans by what they cost once `echoatt refit` has fitted them (cost only)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Analyse, and say what was found."""
    from echoatt_exporter.analyze.run import analyze_model

    with _told_when_stopped(Path(arguments.out)), _progress(quiet=arguments.json) as on_step:
        report = analyze_model(
            arguments.model_dir,
            arguments.text,
            arguments.out,
            method=arguments.method,
            ratio=arguments.ratio,
            max_kl=arguments.max_kl,
            min_similarity=arguments.min_similarity,
            align_heads=not arguments.no_align,
            refit=arguments.refit,
            length=arguments.length,
            samples=arguments.samples,
            calibration_windows=arguments.calibration_windows,
            seed=arguments.seed,
            device=arguments.device,
            force=arguments.force,
            trust_remote_code=arguments.trust_remote_code,
            on_step=on_step,
        )
    if arguments.json:
        print(report.to_json())
    else:
        _show(report)
    return 0


@contextlib.contextmanager
def _told_when_stopped(out: Path) -> Iterator[None]:
    """Say, when it is interrupted, what is left of the work."""
    try:
        yield
    except KeyboardInterrupt:
        if (out / "progress").is_dir():
            print(
                f"echoatt: stopped; {out / 'progress'} keeps what was measured, and the same"
                " command goes on from there",
                file=sys.stderr,
            )
        raise


def _show(report: AnalysisReport) -> None:
    """Print the plan, what it costs, the front, and where everything is."""
    from rich.box import SIMPLE
    from rich.table import Table

    from echoatt_cli.console import console, show_plan

    chosen = report.chosen
    show_plan(chosen.plan.sources)
    # fits a window of 80 columns; the report has the plans themselves
    table = Table(title=report.selection, title_justify="left", box=SIMPLE, show_edge=False)
    for heading in (
        "followers", "KL, nats/token", "perplexity", "weights", "cache B/tok", "est. speed",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    shown = [chosen] if report.search is None else [*report.search.front]
    if chosen not in shown:
        shown.append(chosen)
    for candidate in sorted(shown, key=lambda one: len(one.plan.followers)):
        table.add_row(*_cells(candidate), style="bold" if candidate == chosen else "")
    console.print(table)
    for warning in report.warnings:
        console.print(f"\n{warning}\n", style="bold red", soft_wrap=True, highlight=False)
    front = "" if report.search is None else ", the front's plans in front/"
    console.print(
        f"{report.out / 'report.html'}: the report; beside it the plan in plan.json{front};"
        f" {report.similarity.samples} samples of {report.similarity.length} tokens,"
        f" {report.seconds:,.0f} s",
        soft_wrap=True,
        highlight=False,
    )


def _cells(candidate: PlanCandidate) -> list[str]:
    cost, footprint = candidate.cost, candidate.footprint
    return [
        f"{len(candidate.plan.followers)} ({candidate.plan.ratio:.0%})",
        f"{cost.kl:.4f} ± {cost.kl_standard_error:.4f}",
        f"{cost.perplexity_ratio:.3f}x{' ruined' if cost.ruined else ''}",
        f"-{footprint.parameters_removed_share:.1%}",
        f"{footprint.cache_bytes_per_token:,.0f}",
        f"{candidate.estimated_speed:.2f}x",
    ]


_HEADINGS = {
    "load": "loading model and text",
    "samples": "comparing attention maps",
    "fits": "fitting all pairs",
    "screen": "estimating all pairs",
    "pairs": "measuring pairs",
    "plans": "measuring plans",
    "best plans": "measuring the best plans",
}


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[OnStep]:
    """A bar for each step; where nobody watches a terminal, a line now and then."""
    if quiet:
        yield lambda _step, _done, _total: None
    elif sys.stderr.isatty():
        with _bars() as on_step:
            yield on_step
    else:
        yield _Lines()


@contextlib.contextmanager
def _bars() -> Iterator[OnStep]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks = {
            name: bar.add_task(heading, total=None, start=False, visible=False)
            for name, heading in _HEADINGS.items()
        }

        def on_step(step: str, done: int, total: int) -> None:
            if step == "resumed":
                bar.console.print(_resumed(done))
                return
            bar.start_task(tasks[step])
            bar.update(tasks[step], completed=done, total=total, visible=True)

        yield on_step


class _Lines:
    """What is being done as lines on standard error: one when it begins, then one now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._step = ""
        self._said = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now = self._clock()
        if step == "load":  # short, and what is wrong with the input is to be a line alone
            return
        if step == self._step and now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._step, self._said = step, now
        line = _resumed(done) if step == "resumed" else f"{_HEADINGS[step]}: {done} of {total}"
        print(f"echoatt: {line}, after {now - self._start:,.0f} s", file=sys.stderr, flush=True)


def _resumed(plans: int) -> str:
    return f"going on from what was measured before: {plans} plans"
