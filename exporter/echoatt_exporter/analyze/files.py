"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, replacing one that is there only when all is written."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_bytes(data)
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
