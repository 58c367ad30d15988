"""What an export or a rewrite reports, while it goes on and in the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoatt_exporter.graph import PassReport
from echoatt_exporter.parity import ParityReport
from echoatt_runtime.contract import Manifest

# Told (step, done, total)
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export or a rewrite did.

    Attributes:
        model: The published model file.
        manifest: The manifest inside it.
        passes: What each graph pass changed, in order.
        parity: The comparison with PyTorch; None if it was not asked for.
        parameters: Elements of all weights in the graph.
        seconds: Wall time of the whole.
        notes: What a user should know of the checkpoint, in a line each.
    """

    model: Path
    manifest: Manifest
    passes: Sequence[PassReport]
    parity: ParityReport | None
    parameters: int
    seconds: float
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        """The report for a program to read."""
        data: dict[str, Any] = {
            "model": str(self.model),
            "manifest": json.loads(self.manifest.to_json()),
            "parameters": self.parameters,
            "model_bytes": self.model.stat().st_size,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "passes": [dataclasses.asdict(report) for report in self.passes],
            "parity": None if self.parity is None else self.parity.to_dict(),
        }
        return json.dumps(data)


def ignore_step(_name: str, _done: int, _total: int) -> None:
    """Tell nobody."""
