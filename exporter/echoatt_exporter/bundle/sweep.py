"""Sweeping: staging folders whose process is gone are removed by the next export to their place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from echoatt_exporter.bundle.lock import Lock
from echoatt_exporter.bundle.publish import finish
from echoatt_exporter.bundle.stage import PREFIX, Stage
from echoatt_exporter.errors import ExportError

# As tempfile names them
_NAME = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")


def sweep(place: Path) -> None:
    """Remove the staging folders of exports that were killed.

    Where an export was killed between the removal of the old model file and the arrival of the new
    one, its bundle, which is whole, is published first. A folder that is in use, or of which the
    file system cannot say whether it is, stays; so does one that cannot be removed.

    Args:
        place: A directory that bundles are written to; it need not exist.
    """
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        roots = [
            Path(entry.path)
            for entry in entries
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
        for root in roots:
            with contextlib.suppress(OSError, ExportError):
                _remove(Stage(root))


def _remove(stage: Stage) -> None:
    lock = Lock.take(stage.lock_file)
    if lock is None:
        return
    try:
        if lock.certain:
            finish(stage)
            shutil.rmtree(stage.root)
    finally:
        lock.release()
