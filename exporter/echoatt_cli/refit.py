"""`echoatt refit STUDENT_DIR OUT_DIR`: fit a student's weights to its teacher, in closed form."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echoatt_exporter.refit.run import RefitRun

HELP = "fit a student to its teacher by regressions on text: minutes, no gradients"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("student_dir", metavar="STUDENT_DIR", help="what `echoatt share` made")
    parser.add_argument("out", metavar="OUT_DIR", help="a directory to be made")
    parser.add_argument("--teacher", metavar="DIR", required=True, help="what it was made of")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", required=True, help=".txt, .md, .jsonl, or folders"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (256)")
    parser.add_argument(
        "--windows", type=int, default=128, metavar="N", help="of the text, at most (128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    parser.add_argument("--device", default="cpu", help="where the models run (cpu)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoints bring"
    )


def run(arguments: argparse.Namespace) -> int:
    """Fit, save, and say what it did."""
    from echoatt_exporter.refit.run import refit

    with _progress(quiet=arguments.json) as on_step:
        done = refit(
            arguments.student_dir,
            arguments.teacher,
            arguments.text,
            arguments.out,
            length=arguments.length,
            windows=arguments.windows,
            seed=arguments.seed,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            on_step=on_step,
        )
    if arguments.json:
        print(json.dumps(_record(done)))
    else:
        _show(done)
    return 0


def _record(done: RefitRun) -> dict[str, object]:
    report = done.report
    return {
        "student": str(done.student),
        "kl_before": report.kl_before,
        "kl": report.kl,
        "tokens": report.tokens,
        "held_out_tokens": report.held_out_tokens,
        "starved": report.starved,
        "unchanged_layers": report.unchanged,
        "steps": [
            {
                "fits": [dataclasses.asdict(fit) for fit in step.fits],
                "refused": step.refused,
                "kl": step.kl,
            }
            for step in report.steps
        ],
        "resumed_steps": done.resumed,
        "seconds": done.seconds,
        "notes": list(done.notes),
    }


def _show(done: RefitRun) -> None:
    """Print what was fitted and what it gave."""
    from echoatt_cli.console import console, show_notes

    report = done.report
    show_notes(done.notes)
    if not report.steps:
        console.print("no layer follows another: the student is its teacher, and stays as it is")
    if report.unchanged:
        layers = ", ".join(map(str, report.unchanged))
        console.print(f"new weights made the KL no less, and were not kept, in layers {layers}")
    if report.starved:
        console.print(
            f"{report.tokens:,} tokens are fewer than some layer has inputs; more text fits better"
        )
    console.print(
        f"{done.student}: KL to the teacher {report.kl_before:.4f} → {report.kl:.4f} nats a token"
        f" on {report.held_out_tokens:,} held-out tokens, fitted on {report.tokens:,},"
        f" {done.seconds:,.0f} s",
        soft_wrap=True,
        highlight=False,
    )


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("loading model and text", total=None)

        def on_step(name: str, done: int, total: int) -> None:
            if name == "fit":
                bar.update(task, description="fitting followers", completed=done, total=total)

        yield on_step
