"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.errors import one_line


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, replacing one that is there only when all is written.

    Raises:
        AnalysisError: It cannot be written; what was there is as it was.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_bytes(data)
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise AnalysisError(f"{path}: cannot write the file ({one_line(error)})") from error
