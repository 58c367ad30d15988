"""What an unfinished analysis has measured, in the folder that it is to become.

A search over a deep model takes minutes, and may be stopped at any of them. Whatever is measured is
written now and then, each file whole or not at all; the same command finds it and goes on to the
same result, bit for bit with the same number of threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.analyze.files import write_whole
from echoatt_exporter.analyze.measured import Measured
from echoatt_exporter.errors import AnalysisError, OutputExistsError
from echoatt_runtime.errors import one_line

PROGRESS = "progress"
_KEY = "key.json"
_FORMAT = "echoatt-progress/1"

# Seconds between two writings: what an analysis that is killed loses at most
_BETWEEN = 5.0

Floats = NDArray[np.float64]


class Progress:
    """The folder `progress` of an output folder.

    Attributes:
        folder: Where it is.
        measured: The plans measured so far.
    """

    def __init__(self, out: Path, origin: Mapping[str, Any], *, force: bool) -> None:
        """Begin, or go on where the same analysis was stopped.

        Args:
            out: The output folder; it is made if it is not there.
            origin: All that the numbers depend on: model, text, options, versions.
            force: Give up what another analysis has begun.

        Raises:
            OutputExistsError: Another analysis was begun there.
            AnalysisError: The folder cannot be read or written.
        """
        self.folder = out / PROGRESS
        key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        record = json.dumps({"format": _FORMAT, "key": key, **origin}, sort_keys=True).encode()
        self._unwritten: dict[str, dict[str, Floats]] = {}
        self._written = time.monotonic()
        try:
            path = self.folder / _KEY
            if self.folder.exists() and not (path.exists() and path.read_bytes() == record):
                if not force:
                    raise OutputExistsError(
                        f"{out}: another analysis was begun here, of other text, with other options"
                        " or of another model; name another folder, or pass --force"
                    )
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, record)
            self.measured = Measured(self.folder / "measured.json")
        except OSError as error:
            raise AnalysisError(f"{out}: cannot keep progress ({one_line(error)})") from error

    def arrays(self, name: str) -> dict[str, Floats] | None:
        """What was kept under a name; None if nothing was."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as found:
            return dict(found)

    def keep(self, name: str, arrays: Mapping[str, Floats]) -> None:
        """Keep arrays under a name, in the place of earlier ones, and write them now and then.

        Args:
            name: Of the file, without an ending.
            arrays: By name.

        Raises:
            AnalysisError: They cannot be written.
        """
        self._unwritten[name] = dict(arrays)
        if time.monotonic() - self._written > _BETWEEN:
            self.flush()

    def flush(self) -> None:
        """Write everything that is not written.

        Raises:
            AnalysisError: It cannot be.
        """
        for name in list(self._unwritten):
            data = io.BytesIO()
            np.savez(data, allow_pickle=False, **self._unwritten[name])
            write_whole(self.folder / f"{name}.npz", data.getvalue())
            del self._unwritten[name]
        self.measured.keep(now=True)
        self._written = time.monotonic()
