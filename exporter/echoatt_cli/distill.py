"""`echoatt distill`: heal a student by distillation and training."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echoatt_exporter.distill.run import DistillReport
    from echoatt_exporter.distill.trainer import Progress

HELP = "heal a student: distil its teacher into it, then train it on text"

# Every option of DistillConfig, which says more of each. Defaults are not repeated here: what is
# left out comes from --config, or from there.
OPTIONS: dict[str, tuple[type | tuple[str, ...], str]] = {
    "length": (int, "tokens of a row (2048, at most the model's context)"),
    "batch_size": (int, "rows of a process in one forward pass (8)"),
    "gradient_accumulation": (int, "forward passes in one step (1)"),
    "stage1_steps": (int, "steps of stage 1, distillation (both stages read the text once)"),
    "stage1_tokens": (int, "the same in tokens"),
    "stage2_steps": (int, "steps of stage 2, cross-entropy on the text (a quarter of stage 1)"),
    "stage2_tokens": (int, "the same in tokens"),
    "block_weight": (float, "weight of the MSE of the block outputs (0.25)"),
    "kl_weight": (float, "weight of the KL divergence (0.25)"),
    "label_weight": (float, "weight of the cross-entropy to the teacher's argmax (0.5)"),
    "temperature": (float, "of the KL (1)"),
    "kl_direction": (
        ("student_teacher", "teacher_student"),
        "KL(student || teacher), the paper's, or the other (student_teacher)",
    ),
    "learning_rate": (float, "at the end of the warm-up (1e-4)"),
    "stage2_learning_rate": (float, "the same for stage 2 (as stage 1)"),
    "scheduler": (("cosine", "linear", "constant"), "of the learning rate (cosine)"),
    "warmup": (float, "share of a stage's steps (0.005)"),
    "weight_decay": (float, "on matrices (0)"),
    "max_grad_norm": (float, "gradients are scaled down to it; 0 for no limit (1)"),
    "dtype": (("fp32", "bf16"), "of the computation; weights stay fp32 (fp32)"),
    "attention": (("auto", "materialized", "recomputed"), "how followers attend (auto)"),
    "gradient_checkpointing": (bool, "compute layers again instead of keeping them"),
    "seed": (int, "of the order of the rows (0)"),
    "log_steps": (int, "steps between two lines of the log (10)"),
    "save_steps": (int, "steps between two checkpoints (500)"),
    "keep_checkpoints": (int, "checkpoints kept of a stage (2)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--teacher", metavar="DIR", required=True, help="the teacher")
    parser.add_argument(
        "--student",
        metavar="DIR",
        required=True,
        help="a student; a teacher's directory is trained unshared, as a control",
    )
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", required=True, help=".txt, .md, .jsonl, or folders"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="gets student, loss.png, log.jsonl; the same command goes on where it stopped",
    )
    parser.add_argument("--config", metavar="FILE", help="the options below as YAML")
    for name, (kind, text) in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(flag, choices=kind, help=text)
        else:
            metavar = "N" if kind is int else "X"
            parser.add_argument(flag, type=kind, metavar=metavar, help=text)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoints bring"
    )


def run(arguments: argparse.Namespace) -> int:
    """Heal, and say what was done."""
    from echoatt_exporter.distill.config import DistillConfig
    from echoatt_exporter.distill.run import distill

    given: dict[str, Any] = {
        name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None
    }
    from_file = DistillConfig.read_yaml(arguments.config) if arguments.config else {}
    for stage in ("stage1", "stage2"):  # one way of saying how long replaces the other
        if f"{stage}_steps" in given or f"{stage}_tokens" in given:
            from_file.pop(f"{stage}_steps", None)
            from_file.pop(f"{stage}_tokens", None)
    config = DistillConfig.of(
        {**from_file, **given}, arguments.config or "the training configuration"
    )
    with _progress(quiet=arguments.json) as on_step:
        report = distill(
            arguments.teacher,
            arguments.student,
            arguments.text,
            arguments.out,
            config,
            trust_remote_code=arguments.trust_remote_code,
            on_step=on_step,
        )
    if report is not None:
        print(report.to_json() if arguments.json else _summary(report))
    return 0


def _summary(report: DistillReport) -> str:
    losses = ", ".join(f"stage {stage} {loss:.4f}" for stage, loss in report.losses.items())
    speed = (
        "" if report.tokens_per_second is None else f", {report.tokens_per_second:,.0f} tokens/s"
    )
    return (
        f"{report.student}: {report.tokens:,} tokens in {sum(report.steps):,} steps,"
        f" {report.seconds:,.0f} s{speed}; last losses: {losses}"
    )


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar a stage, with tokens/s and time left; drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("stage {task.fields[stage]}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
        TextColumn("{task.fields[speed]:>8,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:
        tasks: dict[int, Any] = {}
        starts: dict[int, tuple[int, float]] = {}

        def on_step(progress: Progress) -> None:
            now = time.monotonic()
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(
                    "", total=progress.steps, stage=progress.stage, speed=0.0
                )
                starts[progress.stage] = (progress.step, now)
            step, then = starts[progress.stage]
            speed = (progress.step - step) * progress.tokens / max(now - then, 1e-9)
            bar.update(tasks[progress.stage], completed=progress.step, speed=speed)

        yield on_step
