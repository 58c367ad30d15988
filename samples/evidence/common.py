"""What the evidence's measurements share: where things are, and how results are written down."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echoatt_exporter.evaluate.models import CheckpointModel
from echoatt_exporter.evaluate.perplexity import score_documents
from echoatt_exporter.evaluate.score import TextScore
from echoatt_exporter.texts import Text, read_texts

HERE = Path(__file__).resolve().parent
# The context that the teacher was trained at
LENGTH = 256
RATIOS = (0.25, 5 / 12, 0.75)
PACKAGES = ("torch", "transformers", "numpy")
# Of each held-out book, so that long ones do not outweigh the others
_VALID_CHARACTERS = 50_000


def arguments(description: str | None, extend: Callable[[Any], None] | None = None) -> Any:
    """The command line: the folder with checkpoint and texts, and where results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--shared",
        type=Path,
        default=HERE.parents[2] / "shared",
        help="folder with models/books12 and data/books (default: beside the repository)",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    if extend is not None:
        extend(parser)
    parsed = parser.parse_args()
    parsed.model = parsed.shared / "models" / "books12"
    parsed.train = parsed.shared / "data" / "books" / "train"
    parsed.valid = parsed.shared / "data" / "books" / "valid"
    return parsed


def held_out(folder: Path) -> list[Text]:
    """The beginning of each book that nothing was trained or calibrated on."""
    return [Text(text.name, text.content[:_VALID_CHARACTERS]) for text in read_texts([folder])]


def score(
    model: PreTrainedModel, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase
) -> TextScore:
    """Every token with at least 128 before it, in windows of the length of the training."""
    scored = CheckpointModel(model, tokenizer)
    return score_documents(scored, texts, length=LENGTH, stride=LENGTH // 2)


def percent(ratio: float) -> str:
    """A share as people say it."""
    return f"{100 * ratio:.0f} %"


def provenance(packages: Sequence[str] = PACKAGES) -> str:
    """The command, the day, the versions and the machine, as a line below a table."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    script = Path(sys.argv[0])
    command = f"python -m samples.{script.parent.name}.{script.stem}"
    return (
        f"`{command}`, {dt.datetime.now(dt.UTC):%Y-%m-%d}; Python {platform.python_version()},"
        f" {versions}; {_processor()}, {os.cpu_count()} cores"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is of numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def publish(
    results: Path, name: str, data: Any, markdown: str, packages: Sequence[str] = PACKAGES
) -> None:
    """Write `name.json` and `name.md`, and print the latter."""
    results.mkdir(parents=True, exist_ok=True)
    text = f"{markdown}\n\n{provenance(packages)}\n"
    (results / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
