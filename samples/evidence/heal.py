"""Heals a student at each ratio, and a control: the unshared teacher trained the same way.

    .venv/bin/python -m samples.evidence.heal

Takes the plans that `untrained.py` wrote. Two trainings run at a time, one thread each; killed
and started again it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from samples.evidence.common import (
    HERE,
    RATIOS,
    arguments,
    held_out,
    percent,
    publish,
    score,
    table,
)

from echoatt_exporter import SharingPlan
from echoatt_exporter.evaluate.score import TextScore, compare_scores
from echoatt_exporter.share.checkpoint import load_model
from echoatt_exporter.texts import load_tokenizer

CONTROL = "control"
GOALS = (1.01, 1.02, 1.08)
_KINDS = ("cost", "cost-aligned")


def _options(parser: Any) -> None:
    parser.add_argument("--work", type=Path, default=Path("out/evidence"), help="for checkpoints")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="that each model trains on")


def _echoatt(*command: object) -> None:
    program = Path(sys.executable).with_name("echoatt")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([program, *map(str, command)], check=True, env=environment)


def _heal(name: str, student: Path, args: Any) -> Path:
    """Train one model, unless that is done, and give back where it is."""
    out: Path = args.work / name
    if not (out / "student").exists():
        _echoatt(
            *("distill", "--teacher", args.model, "--student", student, "--out", out),
            *("--text", args.train, "--config", HERE / "recipe.yaml"),
            *("--stage1-tokens", args.tokens * 4 // 5, "--stage2-tokens", args.tokens // 5),
        )
    return out / "student"


def _plan(results: Path, ratio: float) -> Path:
    """Of the plans chosen by cost, the one that cost least where it was chosen."""
    files = [results / "plans" / f"{percent(ratio)[:2]}-{kind}.json" for kind in _KINDS]
    return min(files, key=lambda file: json.loads(file.read_text(encoding="utf-8"))["kl"])


def _students(args: Any) -> dict[str, Path]:
    """The models to train, by name; students are made where they are not there yet."""
    models = {CONTROL: args.model}
    for ratio in RATIOS:
        directory = args.work / f"untrained-{percent(ratio)[:2]}"
        if not directory.exists():
            _echoatt("share", args.model, directory, "--plan", _plan(args.results, ratio))
        models[percent(ratio)] = directory
    return models


def main() -> None:
    """Train, score on the held-out books, write the table and keep the curves."""
    args = arguments(__doc__, _options)
    args.work.mkdir(parents=True, exist_ok=True)
    students = _students(args)
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(_heal, name, where, args) for name, where in students.items()}
    healed = {name: run.result() for name, run in runs.items()}
    valid, tokenizer = held_out(args.valid), load_tokenizer(args.model)
    places = {"teacher": args.model, **healed}
    places |= {f"{name} before": students[name] for name in students if name != CONTROL}
    scores: dict[str, TextScore] = {}
    for name, place in places.items():
        scores[name] = score(load_model(place, dtype=torch.float32), valid, tokenizer)
    teacher, control = scores["teacher"], scores[CONTROL]
    against = compare_scores(control, teacher)
    rows = [
        ["teacher", "", f"{teacher.perplexity:.2f}", "1", "", ""],
        ["control, 0 %", "", f"{control.perplexity:.2f}", f"{against.ratio:.4f}", "1", ""],
    ]
    data: dict[str, Any] = {
        "tokens": args.tokens,
        "teacher": teacher.perplexity,
        CONTROL: control.perplexity,
    }
    for ratio, goal in zip(RATIOS, GOALS, strict=True):
        name = percent(ratio)
        before, after = scores[f"{name} before"], scores[name]
        to_teacher, to_control = compare_scores(after, teacher), compare_scores(after, control)
        low, high = to_control.interval
        rows.append(
            [
                name,
                f"{before.perplexity:.2f}",
                f"{after.perplexity:.2f}",
                f"{to_teacher.ratio:.4f}",
                f"{to_control.ratio:.4f} ({low:.4f} to {high:.4f})",
                f"{goal:.2f}",
            ]
        )
        plan = _plan(args.results, ratio)
        data[name] = {
            "plan": plan.name,
            "sources": SharingPlan.load(plan).sources,
            "before": before.perplexity,
            "after": after.perplexity,
            "to_control": to_control.ratio,
            "interval": to_control.interval,
        }
    for name in healed:
        stem = f"loss-{name.split()[0]}"
        for suffix in (".png", ".jsonl"):
            kept = args.work / name / ("loss.png" if suffix == ".png" else "log.jsonl")
            shutil.copyfile(kept, args.results / f"{stem}{suffix}")
    header = ["followers", "before", "after", "to the teacher", "to the control", "goal"]
    heading = (
        f"Perplexity on {teacher.tokens:,} tokens of the held-out books, before and after"
        f" {args.tokens:,} tokens of training (four fifths in stage 1), 95 % intervals:\n\n"
    )
    publish(args.results, "healed", data, heading + table(header, rows))


if __name__ == "__main__":
    main()
