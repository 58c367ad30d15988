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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from samples.evidence.common import publish, table
from samples.robustness.cases import FAMILIES, Case
from samples.robustness.goods import PARTS
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
        page = _page(verdicts, seconds, options)
        publish(options.results, "fuzz", _data(verdicts), page, PACKAGES)
    print(f"{len(verdicts)} cases, {found} with faults, {seconds:.0f} s")
    return 1 if found else 0


def _goods(folder: Path) -> Goods:
    if folder.is_dir() and any(folder.iterdir()):
        return find_goods(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # In processes of their own: what runs operators starts threads, which do not outlive a fork
    children = [_fork(part, folder) for part in PARTS]
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("what is to be spoilt could not be made")
    return find_goods(folder)


def _fork(make: Callable[[Path], None], folder: Path) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        make(folder)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _line(verdict: Verdict) -> str:
    case = verdict.case
    faults = "".join(f"\n    {fault}" for fault in verdict.faults)
    return (
        f"case {case.number}, {case.kind}, {case.family}: {verdict.done}\n"
        f"    {verdict.outcome}: {verdict.message[:300]}{faults}"
    )


def _data(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Outcomes by family, for a program to read. A case is made again from seed and number."""
    families: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        families.setdefault(_name(verdict), Counter())[verdict.outcome] += 1
    found = {verdict.case.number: verdict.faults for verdict in verdicts if verdict.faults}
    return {"cases": len(verdicts), "families": families, "faults": found}


def _name(verdict: Verdict) -> str:
    return f"{verdict.case.kind}: {verdict.case.family}"


def _page(verdicts: Sequence[Verdict], seconds: float, options: argparse.Namespace) -> str:
    names = [f"{kind}: {family}" for kind, families in FAMILIES.items() for family in families]
    rows = [_row(name, own) for name in names if (own := [v for v in verdicts if _name(v) == name])]
    header = ("family", "cases", "work", "faults", "most s", "most MB", "ended in")
    slowest = sorted(verdicts, key=lambda v: -v.seconds)[:_SLOWEST]
    return "\n".join(
        (
            f"{len(verdicts):,} cases of seed {options.seed} in {seconds:,.0f} s, {options.workers}"
            " at a time. *Work*: loaded, ran and gave what it was asked for; the others ended in an"
            " error, of which the first of a case counts. *Faults*: what must not be, such as an"
            " error of no type of ours. *Most s* is time on the wall, beside other work, and *most"
            " MB* memory beyond what every case has.",
            "",
            table(header, [*rows, _row("all", verdicts)]),
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
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    works = outcomes.pop(WORKS, 0)
    return (
        name,
        f"{len(verdicts):,}",
        f"{works:,}",
        f"{sum(bool(verdict.faults) for verdict in verdicts):,}",
        f"{max(verdict.seconds for verdict in verdicts):.1f}",
        f"{max(verdict.peak_bytes for verdict in verdicts) / 1e6:,.0f}",
        ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common()),
    )


if __name__ == "__main__":
    sys.exit(main())
