"""Writes a bench's results: Markdown for people, JSON for programs, a plot for both."""

from __future__ import annotations

import uuid
from pathlib import Path

from echoatt_exporter.bench.plot import results_png
from echoatt_exporter.bench.results import BenchResults
from echoatt_exporter.bench.table import to_markdown
from echoatt_exporter.errors import BenchError, OutputExistsError

_NAMES = ("results.md", "results.json", "results.png")


def check_free(directory: Path, *, force: bool) -> None:
    """Refuse to overwrite, before anything is measured.

    Raises:
        OutputExistsError: There are results, and not `force`.
        BenchError: The directory cannot be made.
    """
    for name in _NAMES:
        if (directory / name).exists() and not force:
            raise OutputExistsError(
                f"{directory / name} exists; choose another directory or pass --force"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{directory}: cannot make the directory ({error})") from error


def write_results(results: BenchResults, directory: Path) -> None:
    """Write all three files, each whole or not at all.

    Args:
        results: What was measured.
        directory: An existing one.

    Raises:
        BenchError: The file system refuses.
    """
    contents = (
        to_markdown(results).encode(),
        results.to_json().encode(),
        results_png(results),
    )
    for name, content in zip(_NAMES, contents, strict=True):
        partial = directory / f".{name}.{uuid.uuid4().hex}.partial"
        try:
            partial.write_bytes(content)
            partial.replace(directory / name)
        except OSError as error:
            raise BenchError(f"{directory / name}: cannot write ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
