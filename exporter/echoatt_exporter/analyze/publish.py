"""A folder of an analysis: whole or not at all, and never in the place of anything else."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from echoatt_exporter.analyze.progress import PROGRESS
from echoatt_exporter.errors import AnalysisError, OutputExistsError
from echoatt_runtime.errors import one_line

SIMILARITY, PICTURE, PLAN = "similarity.json", "similarity.png", "plan.json"
SEARCH, FRONT, PAGE = "search.json", "front", "report.html"
# The paper's plan by the maps without the first token
WITHOUT_FIRST = "plan-without-first-token.json"
_OWN = {SIMILARITY, PICTURE, PLAN, SEARCH, FRONT, PAGE, WITHOUT_FIRST}


def check_free(out: Path, *, force: bool) -> None:
    """Refuse a place that holds something, before any work is done.

    What an analysis has begun there does not count.

    Args:
        out: The folder that is to be written.
        force: Replace an earlier analysis.

    Raises:
        OutputExistsError: Something is there; with `force`, something that no analysis wrote.
        AnalysisError: The folder cannot be read.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out}: is a file; name a folder")
    try:
        found = sorted(path.name for path in out.iterdir() if path.name != PROGRESS)
    except OSError as error:
        raise AnalysisError(f"{out}: cannot be read ({error.strerror})") from error
    if foreign := [name for name in found if name not in _OWN]:
        raise OutputExistsError(
            f"{out}: holds {foreign[0]}, which is no part of an analysis; name another folder"
        )
    if found and not force:
        raise OutputExistsError(f"{out}: exists; name another folder, or pass --force")


@contextlib.contextmanager
def published(out: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place when the block ends without an error.

    Args:
        out: As in `check_free`.
        force: As in `check_free`.

    Raises:
        OutputExistsError: Something came to be there meanwhile.
        AnalysisError: The file system refuses; `out` is as it was.
    """
    place = out.resolve()
    hidden = f".{place.name}.{uuid.uuid4().hex}"
    partial, former = (place.with_name(f"{hidden}.{end}") for end in ("partial", "former"))
    try:
        partial.mkdir(parents=True)
        yield partial
        check_free(out, force=force)
        if out.exists():
            place.rename(former)
        partial.rename(place)
    except OSError as error:
        raise AnalysisError(f"{out}: cannot write the analysis ({one_line(error)})") from error
    finally:
        if former.exists() and not place.exists():
            former.rename(place)
        for path in (partial, former):
            shutil.rmtree(path, ignore_errors=True)
