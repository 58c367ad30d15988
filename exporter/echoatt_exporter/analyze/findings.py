"""What an analysis found: the similarity, the chosen plan and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echoatt_exporter.analyze.candidates import PlanCandidate, PlanSearch
from echoatt_exporter.analyze.choice import Method
from echoatt_exporter.analyze.probe import RUIN
from echoatt_exporter.analyze.publish import WITHOUT_FIRST
from echoatt_exporter.analyze.select import follows_the_sink
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
class SinkFinding:
    """Whether the paper's cut is that of an attention sink, and the same rule without it.

    Attributes:
        kept: How much of the cut is left without the first token; see `kept_without_first`.
        beside: The plan of the same rule on maps without the first token.
    """

    kept: float | None
    beside: PlanCandidate

    @property
    def followed(self) -> bool:
        """Whether it is."""
        return follows_the_sink(self.kept)


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
        sink: What the paper's method makes of the first token; None for the others.
        alignment: How the followers' heads line up, one entry a follower; None if they were left
            as they stood.
        calibration_windows: Samples that costs were measured on.
        refit: Whether costs are those of re-fitted followers.
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
    sink: SinkFinding | None
    alignment: Sequence[HeadAlignment] | None
    calibration_windows: int
    refit: bool
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
            "refit": self.refit,
            "length": similarity.length,
            "seed": similarity.seed,
        }

    @property
    def warnings(self) -> list[str]:
        """What to know before anything is done with the plan, a sentence or two each."""
        found = []
        cost = self.chosen.cost
        if cost.ruined:
            found.append(
                f"This plan ruins the model: perplexity {cost.perplexity_ratio:,.1f} times as high,"
                f" KL {cost.kl:.2f} nats a token ({RUIN:g} times, or {math.log(RUIN):.2f} nats, is"
                " where healing has little to start from). Let fewer layers follow"
                + ("." if self.method == "cost" else ", or let cost choose them.")
            )
        if self.sink is not None and self.sink.followed:
            beside = self.sink.beside
            found.append(
                "The cut is the attention sink's: without the first token"
                f" {max(0.0, self.sink.kept or 0.0):.0%} is left of the difference between the"
                " layers that follow and the others. The same rule on maps without it lets"
                f" {len(beside.plan.followers)} of {beside.plan.num_layers} follow, at a KL of"
                f" {beside.cost.kl:.4f} and a perplexity {beside.cost.perplexity_ratio:,.3f} times"
                f" as high: {WITHOUT_FIRST}."
            )
        return found

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
            "warnings": self.warnings,
            "without_first_token": None
            if self.sink is None
            else {
                "kept": self.sink.kept,
                "attention_sink": self.sink.followed,
                **self.sink.beside.to_dict(),
            },
            "front": None
            if self.search is None
            else [candidate.to_dict() for candidate in self.search.front],
            "alignment": None if self.alignment is None else list(map(asdict, self.alignment)),
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(data)
