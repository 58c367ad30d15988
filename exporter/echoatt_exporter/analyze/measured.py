"""What plans cost on each batch of windows, in memory and, where a file is given, on disk.

The file is written anew now and then, whole or not at all, so that a search that is stopped can go
on from it. Numbers come back from it exactly as they were.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from echoatt_exporter.analyze.divergence import Divergence
from echoatt_exporter.analyze.files import write_whole
from echoatt_runtime.contract import SharingPlan

# Seconds between two writings of the file: what a search that is killed loses at most
_BETWEEN = 5.0


class Measured:
    """The divergences that were measured, by plan and batch.

    Args:
        path: The file; None keeps everything in memory alone. One that is there is read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[SharingPlan, dict[int, Divergence]] = {}
        self._written = time.monotonic()
        if path is not None and path.exists():
            for entry in json.loads(path.read_text(encoding="utf-8")):
                plan = SharingPlan(tuple(entry["sources"]), tuple(map(tuple, entry["orders"])))
                for batch, (kl, log_p) in entry["batches"].items():
                    self.add(plan, int(batch), Divergence(np.array(kl), np.array(log_p)))

    def __len__(self) -> int:
        """How many plans were measured, if only on some windows."""
        return len(self._found)

    def has(self, plan: SharingPlan, batch: int) -> bool:
        """Whether a plan was measured on a batch."""
        return batch in self._found.get(plan, ())

    def get(self, plan: SharingPlan, batch: int) -> Divergence:
        """What was measured."""
        return self._found[plan][batch]

    def add(self, plan: SharingPlan, batch: int, divergence: Divergence) -> None:
        """Note a measurement."""
        self._found.setdefault(plan, {})[batch] = divergence

    def keep(self, *, now: bool = False) -> None:
        """Write the file, if the last time is some seconds ago.

        Args:
            now: Write it however short that is ago.

        Raises:
            AnalysisError: It cannot be written.
        """
        if self._path is None or not (now or time.monotonic() - self._written > _BETWEEN):
            return
        write_whole(self._path, json.dumps(self._entries()).encode())
        self._written = time.monotonic()

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {
                "sources": plan.sources,
                "orders": plan.head_orders,
                "batches": {
                    batch: (one.kl.tolist(), one.log_p.tolist()) for batch, one in batches.items()
                },
            }
            for plan, batches in self._found.items()
        ]
