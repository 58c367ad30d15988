"""Steps of an unfinished re-fit, in a folder beside the directory that it is to become."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from echoatt_exporter.errors import ExportError
from echoatt_exporter.refit.refit import Fit, Step
from echoatt_runtime.errors import one_line

_KEY = "key.json"


class KeptSteps:
    """The folder.

    Attributes:
        folder: Where it is.
    """

    def __init__(self, out: Path, origin: Mapping[str, Any]) -> None:
        """Begin, or find what the same re-fit left; what another one left is dropped.

        Args:
            out: The directory that the student is to be in.
            origin: All that the numbers depend on: models, text, options, versions.

        Raises:
            ExportError: The folder cannot be read or written.
        """
        self.folder = out.absolute().parent / f".{out.name}.refit"
        record = json.dumps(origin, sort_keys=True)
        key = self.folder / _KEY
        try:
            if not (key.is_file() and key.read_text(encoding="utf-8") == record):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                key.write_text(record, encoding="utf-8")
        except OSError as error:
            raise ExportError(
                f"{out}: cannot keep progress beside it ({one_line(error)})"
            ) from error

    def load(self) -> list[Step]:
        """What was kept, up to the first step that is absent or damaged."""
        steps: list[Step] = []
        while (step := _read(self._path(len(steps)))) is not None:
            steps.append(step)
        return steps

    def keep(self, number: int, step: Step) -> None:
        """Keep a step, whole or not at all.

        Raises:
            ExportError: It cannot be written.
        """
        record = {
            "fits": [dataclasses.asdict(fit) for fit in step.fits],
            "refused": step.refused,
            "kl": step.kl,
        }
        weights = {name: weight.contiguous() for name, weight in step.weights.items()}
        data = save(weights, {"step": json.dumps(record)})
        path = self._path(number)
        staged = path.with_suffix(".partial")
        try:
            staged.write_bytes(hashlib.sha256(data).digest() + data)
            staged.replace(path)
        except OSError as error:
            raise ExportError(f"{path}: cannot keep progress ({one_line(error)})") from error

    def drop(self) -> None:
        """The re-fit is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04}.step"


def _read(path: Path) -> Step | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    record = json.loads(header["__metadata__"]["step"])
    fits = tuple(Fit(**fit) for fit in record["fits"])
    # Products round otherwise where a weight does not lie as torch would lay it
    weights = {name: weight.clone() for name, weight in load(data).items()}
    return Step(fits, tuple(record["refused"]), record["kl"], weights)
