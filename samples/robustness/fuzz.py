"""Spoils bundles and checkpoints in many ways, and sees that each ends well or in a typed error.

    .venv/bin/python -m samples.robustness.fuzz --cases 5000
    .venv/bin/python -m samples.robustness.fuzz --seed 0 --case 17 --keep DIR

The first runs cases 0 to 4,999 and writes `results/fuzz.md`; the second runs one again, and tells
what it did and what came of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from samples.evidence.common import publish, table
from samples.robustness.cases import FAMILIES, Case
from samples.robustness.goods import make_goods
from samples.robustness.judge import WORKS, Verdict, judge_all
from samples.robustness.probe import use
from samples.robustness.target import Goods, find_goods

PACKAGES: Final = ("onnxruntime", "onnx", "torch", "transformers", "tokenizers", "safetensors")
_SLOWEST: Final = 5


def main() -> int:
    """Run the command; gives its exit code: 1 where something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one and tell everything")
    parser.add_argument("--family", help="run only cases whose family's name has this in it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--goods", type=Path, help="keep what is spoilt there for the next run")
    parser.add_argument("--keep", type=Path, help="leave the spoilt directories there")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="echoatt-fuzz-") as folder:
        work = options.keep or Path(folder)
        goods = _goods(options.goods or Path(folder) / "goods")
        if options.case is not None:
            numbers: Sequence[int] = [options.case]
        else:
            numbers = range(options.cases)
        cases = [Case.of(options.seed, number) for number in numbers]
        cases = [case for case in cases if (options.family or "") in f"{case.kind} {case.family}"]
        start = time.monotonic()
        verdicts = []
        for verdict in judge_all(
            cases, goods, use, work, workers=options.workers, keep=bool(options.keep)
        ):
            verdicts.append(verdict)
            if verdict.faults or options.case is not None:
                print(_line(verdict), flush=True)
        seconds = time.monotonic() - start
    found = sum(bool(verdict.faults) for verdict in verdicts)
    if options.case is None and not options.family:
        verdicts.sort(key=lambda verdict: verdict.case.number)
        data = {"seconds": round(seconds, 1), "cases": [_data(verdict) for verdict in verdicts]}
        publish(options.results, "fuzz", data, _page(verdicts, seconds, options), PACKAGES)
    print(f"{len(verdicts)} cases, {found} with faults, {seconds:.0f} s")
    return 1 if found else 0


def _goods(folder: Path) -> Goods:
    if folder.is_dir() and any(folder.iterdir()):
        return find_goods(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: what runs operators starts threads, and those do not outlive a fork
    if (child := os.fork()) == 0:
        try:
            make_goods(folder)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    return find_goods(folder)


def _line(verdict: Verdict) -> str:
    case = verdict.case
    faults = "".join(f"\n    {fault}" for fault in verdict.faults)
    return (
        f"case {case.number}, {case.kind}, {case.family}: {verdict.done}\n"
        f"    {verdict.outcome}: {verdict.message[:300]}{faults}"
    )


def _data(verdict: Verdict) -> dict[str, Any]:
    data = asdict(verdict)
    data |= data.pop("case")
    # It has the paths of this machine
    del data["message"], data["seed"]
    return data | {"seconds": round(verdict.seconds, 2)}


def _page(verdicts: Sequence[Verdict], seconds: float, options: argparse.Namespace) -> str:
    rows = []
    for kind, families in FAMILIES.items():
        for family in families:
            own = [v for v in verdicts if (v.case.kind, v.case.family) == (kind, family)]
            if own:
                rows.append(_row(f"{kind}: {family}", own))
    rows.append(_row("all", verdicts))
    header = ("family", "cases", "works", "refused", "faults", "slowest, s", "most memory, MB")
    errors = Counter(v.outcome for v in verdicts if v.outcome != WORKS)
    slowest = sorted(verdicts, key=lambda v: -v.seconds)[:_SLOWEST]
    return "\n".join(
        (
            f"{len(verdicts):,} cases of seed {options.seed} in {seconds:,.0f} s, {options.workers}"
            " at a time. *Works*: loaded, ran and gave what it was asked for; *refused*: a typed"
            " error of one line. Memory is what a case took beyond what every case has.",
            "",
            table(header, rows),
            "",
            "How the refused ones ended: "
            + ", ".join(f"{name} {count:,}" for name, count in errors.most_common())
            + ".",
            "",
            "The slowest: "
            + "; ".join(
                f"{v.case.number} ({v.case.family}: {_short(v.done)}) {v.seconds:.1f} s"
                for v in slowest
            )
            + ".",
            *_found(verdicts),
        )
    )


def _found(verdicts: Sequence[Verdict]) -> Iterator[str]:
    if found := [verdict for verdict in verdicts if verdict.faults]:
        yield "\n## Faults\n"
        for v in found:
            yield f"- {v.case.number} ({v.case.family}: {_short(v.done)}): {'; '.join(v.faults)}"


def _short(done: str) -> str:
    text = ascii(done)[1:-1]
    return text if len(text) <= 60 else f"{text[:60]}..."


def _row(name: str, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    works = sum(v.outcome == WORKS for v in verdicts)
    faults = sum(bool(v.faults) for v in verdicts)
    return (
        name,
        f"{len(verdicts):,}",
        f"{works:,}",
        f"{sum(v.outcome != WORKS and not v.faults for v in verdicts):,}",
        f"{faults:,}",
        f"{max(v.seconds for v in verdicts):.1f}",
        f"{max(v.peak_bytes for v in verdicts) / 1e6:,.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
