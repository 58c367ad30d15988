"""What an analysis found: the similarity, the chosen plan and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoatt_exporter.analyze.choice import Method
from echoatt_exporter.analyze.search import PlanCandidate, PlanSearch
from echoatt_exporter.analyze.similarity import HeadSimilarity, LayerSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_runtime.contract import SharingPlan


@dataclass(frozen=True, slots=True)
class HeadAlignment:
    """How a follower's heads line up with its source's.

    Attributes:
        follower: The layer whose heads are reordered.
        source: The layer that they are lined up with.
        moved: How many heads change places.
        heads: How many there are.
        before: Mean cosine similarity to the source's heads as the heads stood.
        after: The same once they are reordered.
    """

    follower: int
    source: int
    moved: int
    heads: int
    before: float
    after: float


def head_alignment(plan: SharingPlan, similarity: HeadSimilarity) -> tuple[HeadAlignment, ...]:
    """How the followers of a plan with head orders line up with their sources.

    Args:
        plan: A plan from `align_plan`.
        similarity: What its head orders were chosen by.
    """
    rows = []
    for layer in plan.followers:
        pairs_FS = similarity.head_pairs[layer, :, plan.sources[layer], :]
        heads = range(len(pairs_FS))
        order = (plan.head_orders[layer] if plan.head_orders else ()) or tuple(heads)
        rows.append(
            HeadAlignment(
                follower=layer,
                source=plan.sources[layer],
                moved=sum(head != place for place, head in enumerate(order)),
                heads=len(heads),
                before=float(np.trace(pairs_FS)) / len(heads),
                after=float(pairs_FS[list(order), heads].mean()),
            )
        )
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class AnalysisReport:
    """What an analysis found.

    Attributes:
        model_dir: The teacher's directory.
        out: The directory that the files are in.
        text_paths: What was read.
        documents: How many texts that were.
        architecture: The teacher's shape.
        method: How the plan was chosen.
        selection: The same in words, with the limit that held.
        similarity: Of the layers.
        importance: Each layer's mean similarity to the others; low is important.
        chosen: The plan, and what it costs.
        search: Everything that the cost method measured; None for the others.
        alignment: How the followers' heads line up, one entry a follower; None if they were left
            as they stood.
        calibration_windows: Samples that costs were measured on.
        created: When, ISO 8601 in UTC.
        seconds: Wall time of the whole.
    """

    model_dir: Path
    out: Path
    text_paths: Sequence[Path]
    documents: int
    architecture: DecoderArchitecture
    method: Method
    selection: str
    similarity: LayerSimilarity
    importance: Sequence[float]
    chosen: PlanCandidate
    search: PlanSearch | None
    alignment: Sequence[HeadAlignment] | None
    calibration_windows: int
    created: str
    seconds: float

    def origin(self) -> dict[str, Any]:
        """What model and text the numbers are from, for the files that hold them."""
        similarity = self.similarity
        return {
            "model": similarity.model,
            "checkpoint_digest": similarity.checkpoint_digest,
            "text_digest": similarity.text_digest,
            "calibration_windows": self.calibration_windows,
            "length": similarity.length,
            "seed": similarity.seed,
        }

    def to_json(self) -> str:
        """The report for a program to read; the measurements are in the files in `out`."""
        data: dict[str, Any] = {
            "out": str(self.out),
            "method": self.method,
            "selection": self.selection,
            **self.origin(),
            "samples": self.similarity.samples,
            "importance": list(self.importance),
            "chosen": self.chosen.to_dict(),
            "front": None
            if self.search is None
            else [candidate.to_dict() for candidate in self.search.front],
            "alignment": None if self.alignment is None else list(map(asdict, self.alignment)),
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(data)
