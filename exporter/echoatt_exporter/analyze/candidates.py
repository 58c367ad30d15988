"""What a search found: plans with what they cost and save, and the front of the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.analyze.footprint import PlanFootprint
from echoatt_exporter.analyze.neighbourhood import Sources
from echoatt_exporter.analyze.probe import PlanCost
from echoatt_runtime.contract import SharingPlan


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """A plan, what it costs and what it saves.

    Attributes:
        plan: With head orders where heads are aligned.
        cost: Measured.
        footprint: Counted.
    """

    plan: SharingPlan
    cost: PlanCost
    footprint: PlanFootprint

    @property
    def estimated_speed(self) -> float:
        """See `PlanFootprint.estimated_speed`."""
        return self.footprint.estimated_speed

    @property
    def order(self) -> tuple[float, Sources]:
        """What candidates of one follower count are sorted by: the KL, and never equal."""
        return self.cost.kl, self.plan.sources

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        footprint = self.footprint
        return {
            "sources": list(self.plan.sources),
            "head_orders": [list(order) for order in self.plan.head_orders],
            "followers": len(self.plan.followers),
            "ratio": self.plan.ratio,
            **asdict(self.cost),
            "perplexity_ratio": self.cost.perplexity_ratio,
            "ruined": self.cost.ruined,
            "parameters": footprint.parameters,
            "parameters_removed": footprint.parameters_removed,
            "cache_bytes_per_token": footprint.cache_bytes_per_token,
            "decode_multiply_adds": footprint.student.decode_multiply_adds,
            "forward_multiply_adds": footprint.student.forward_multiply_adds,
            "estimated_speed": self.estimated_speed,
        }


@dataclass(frozen=True, eq=False, slots=True)
class PlanSearch:
    """Everything that a search measured, and what it chose.

    Attributes:
        pair_costs: [L, L] KL of the plan in which the layer of the row alone follows the layer of
            the column; NaN where it may not.
        pair_measured: Bool [L, L], where that was measured on the first windows and not estimated.
        candidates: Every plan measured on all windows, by follower count, then from cheap to dear.
        front: Of each follower count the cheapest plan, but for those that one with more followers
            beats or equals; by follower count.
        chosen: The plan that was asked for.
        tried: Plans measured, on all windows or the first.
    """

    pair_costs: NDArray[np.float64]
    pair_measured: NDArray[np.bool_]
    candidates: tuple[PlanCandidate, ...]
    front: tuple[PlanCandidate, ...]
    chosen: PlanCandidate
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, null where a pair is not admissible."""
        footprint = self.chosen.footprint
        return {
            "context": footprint.context,
            "bytes_per_element": footprint.bytes_per_element,
            "teacher_parameters": footprint.teacher.parameters,
            "tried": self.tried,
            "pair_costs": [
                [None if math.isnan(cost) else cost for cost in row]
                for row in self.pair_costs.tolist()
            ],
            "pair_measured": self.pair_measured.tolist(),
            "chosen": self.chosen.to_dict(),
            "front": [candidate.to_dict() for candidate in self.front],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def front_of(best_by_count: Iterable[PlanCandidate]) -> tuple[PlanCandidate, ...]:
    """What no plan with more followers beats or equals, of each count's cheapest, ascending."""
    kept: list[PlanCandidate] = []
    for candidate in best_by_count:
        while kept and kept[-1].cost.kl >= candidate.cost.kl:
            kept.pop()
        kept.append(candidate)
    return tuple(kept)
