"""Choose a sharing plan by what it costs: pairs are measured, then whole plans are.

Costs of pairs do not add up: a plan's is usually more than its pairs' together, and which plans are
worse than expected only measuring tells. So the sums say where to look, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from echoatt_exporter.analyze.footprint import DecoderSize, PlanFootprint
from echoatt_exporter.analyze.match_heads import align_plan
from echoatt_exporter.analyze.neighbourhood import Neighbourhood, Sources, admissible_pairs
from echoatt_exporter.analyze.probe import PlanCost, PlanProbe
from echoatt_exporter.analyze.similarity import HeadSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.contract import SharingPlan

# Measured plans of one follower count from which plans with one more are made, at least.
_BEAM_WIDTH = 4
# Plans measured for each follower count, and for improving one, unless a budget says otherwise.
_PLANS_PER_COUNT = 6
# Plans measured before the best one of a count counts as not to be improved.
_SWAPS_AT_ONCE = 4
_DEFAULT_CONTEXT = 2048


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
        candidates: Every plan measured, by follower count, then from cheap to dear.
        front: Of each follower count the cheapest plan, but for those that one with more followers
            beats or equals; by follower count.
        chosen: The plan that was asked for.
        measurements: Plans measured in all.
    """

    pair_costs: NDArray[np.float64]
    candidates: tuple[PlanCandidate, ...]
    front: tuple[PlanCandidate, ...]
    chosen: PlanCandidate
    measurements: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, null where a pair is not admissible."""
        footprint = self.chosen.footprint
        return {
            "context": footprint.context,
            "bytes_per_element": footprint.bytes_per_element,
            "teacher_parameters": footprint.teacher.parameters,
            "measurements": self.measurements,
            "pair_costs": [
                [None if math.isnan(cost) else cost for cost in row]
                for row in self.pair_costs.tolist()
            ],
            "chosen": self.chosen.to_dict(),
            "front": [candidate.to_dict() for candidate in self.front],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


# Called after each measurement: how many are done, how many there are at most, and the cheapest
# plan so far among those with the most followers.
OnMeasured = Callable[[int, int, PlanCandidate], None]


def search_plans(
    probe: PlanProbe,
    architecture: DecoderArchitecture,
    config: PreTrainedConfig,
    *,
    ratio: float | None = None,
    max_kl: float | None = None,
    max_ratio: float | None = None,
    head_similarity: HeadSimilarity | None = None,
    budget: int | None = None,
    context: int | None = None,
    bytes_per_element: float = 2.0,
    on_measured: OnMeasured | None = None,
) -> PlanSearch:
    """Find a cheap plan for a sharing ratio, or the largest ratio for a cost.

    Every admissible pair is measured alone. Then, one follower more at a time, plans are made from
    the cheapest measured ones; those that promise most, by the pairs' costs scaled to what their
    parent came to, are measured, and so is the plan that the sums alone would choose. In the end
    the plan that was asked for is improved, one follower or source for another, while that helps.
    The same arguments give the same result.

    Args:
        probe: Measures on the teacher.
        architecture: The teacher's.
        config: The teacher's.
        ratio: Followers / layers wanted, rounded to a whole number of followers, at least one.
        max_kl: Instead of `ratio`: the most that the plan may cost, nats a token.
        max_ratio: How far the front goes if further than `ratio`; with `max_kl` the largest
            ratio that is tried, by default all.
        head_similarity: Where given, every follower's heads are lined up with its source's.
        budget: The most plans to measure, pairs included; by default the pairs and some for each
            follower count. More makes the search wider.
        context: Tokens that the footprints count with; by default 2048, or what the model has.
        bytes_per_element: That the footprints count with.
        on_measured: Called after each measurement.

    Raises:
        AnalysisError: No plan can be what is asked for, or the budget does not reach.
    """
    if (ratio is None) == (max_kl is None):
        raise AnalysisError("give either a sharing ratio or the most KL that a plan may cost")
    if max_kl is not None and not max_kl >= 0:
        raise AnalysisError(f"a KL of at most {max_kl} cannot be; give 0 or more")
    pairs = list(admissible_pairs(architecture.sharing_kinds))
    most = len({follower for follower, _ in pairs})
    wanted = None if ratio is None else _followers(ratio, architecture, most)
    last = wanted or most
    if max_ratio is not None:
        last = max(wanted or 1, _followers(max_ratio, architecture, most))
    least = len(pairs) + last - 1
    if budget is None:
        budget = least + (_PLANS_PER_COUNT - 1) * (last - 1) + 2 * _PLANS_PER_COUNT
    elif budget < least:
        raise AnalysisError(
            f"{budget} measurements are too few: {len(pairs)} pairs and {last - 1} larger plans"
            f" take {least}; allow more, or give fewer or shorter windows to make each cheaper"
        )
    if context is None:
        context = min(_DEFAULT_CONTEXT, architecture.context_length)
    size = DecoderSize.of(config)

    def judge(sources: Sources) -> PlanCandidate:
        plan = SharingPlan(sources)
        if head_similarity is not None:
            plan = align_plan(plan, head_similarity, architecture)
        footprint = size.with_plan(plan, context=context, bytes_per_element=bytes_per_element)
        return PlanCandidate(plan, probe.measure(plan), footprint)

    return _Search(judge, budget, on_measured).run(
        pairs, architecture.num_layers, wanted, max_kl, last
    )


def _followers(ratio: float, architecture: DecoderArchitecture, most: int) -> int:
    """How many followers a ratio asks for."""
    layers = architecture.num_layers
    if not 0 < ratio < 1:
        raise AnalysisError(f"a sharing ratio of {ratio} cannot be; give one between 0 and 1")
    followers = max(1, round(ratio * layers))
    if followers > most:
        raise AnalysisError(
            f"a sharing ratio of {ratio} asks for {followers} followers in {layers} layers, and at"
            f" most {most} can be: the first layer of each attention kind has no source; give at"
            f" most {most / layers:.2f}"
        )
    return followers


class _Search:
    """One search: what has been measured, and what may still be."""

    def __init__(
        self,
        judge: Callable[[Sources], PlanCandidate],
        budget: int,
        on_measured: OnMeasured | None,
    ) -> None:
        self._judge = judge
        self._budget = budget
        self._on_measured = on_measured
        self._measured: dict[int, dict[Sources, PlanCandidate]] = {}  # by follower count
        self._count = 0

    def run(
        self,
        pairs: list[tuple[int, int]],
        num_layers: int,
        wanted: int | None,
        max_kl: float | None,
        last: int,
    ) -> PlanSearch:
        """Measure pairs, then plans of up to `last` followers; see `search_plans`."""
        costs_LL = np.full((num_layers, num_layers), np.nan)
        unshared = tuple(range(num_layers))
        for follower, source in pairs:
            plan = (*unshared[:follower], source, *unshared[follower + 1 :])
            costs_LL[follower, source] = self._measure(plan).cost.kl
        near = Neighbourhood(costs_LL)
        by_sum = near.cheapest_by_sum(last)
        fitting = self._best(1)
        if max_kl is not None and fitting.cost.kl > max_kl:
            (follower,) = fitting.plan.followers
            raise AnalysisError(
                f"no plan stays within a KL of {max_kl}: the cheapest, layer {follower} after layer"
                f" {fitting.plan.sources[follower]}, costs {fitting.cost.kl:.3g}; allow more"
            )
        for count in range(2, last + 1):
            room = self._budget - self._count
            spare = 2 * _PLANS_PER_COUNT  # for improving
            share = max(1, (room - spare) // (last - count + 1))
            self._grow(count, near, by_sum[count - 1], share)
            left = last - count  # each later count needs one at least
            if count == wanted:
                self._improve(count, near, leave=left)
            if max_kl is not None:
                if self._best(count).cost.kl > max_kl:
                    self._improve(count, near, leave=left, goal=max_kl)
                if self._best(count).cost.kl > max_kl:
                    break
                fitting = self._best(count)
        candidates = sorted(
            (candidate for level in self._measured.values() for candidate in level.values()),
            key=lambda candidate: (len(candidate.plan.followers), *_order(candidate)),
        )
        return PlanSearch(
            pair_costs=costs_LL,
            candidates=tuple(candidates),
            front=_front(self._best(count) for count in sorted(self._measured)),
            chosen=fitting if wanted is None else self._best(wanted),
            measurements=self._count,
        )

    def _measure(self, sources: Sources) -> PlanCandidate:
        candidate = self._judge(sources)
        self._measured.setdefault(len(candidate.plan.followers), {})[sources] = candidate
        self._count += 1
        if self._on_measured is not None:
            self._on_measured(self._count, self._budget, self._best(max(self._measured)))
        return candidate

    def _best(self, count: int) -> PlanCandidate:
        """The cheapest measured plan with `count` followers."""
        return min(self._measured[count].values(), key=_order)

    def _grow(self, count: int, near: Neighbourhood, by_sum: Sources, share: int) -> None:
        """Measure `share` plans with `count` followers, made from the best with one less."""
        parents = sorted(self._measured[count - 1].values(), key=_order)
        expected: dict[Sources, float] = {by_sum: -math.inf}  # comes first
        for parent in parents[: max(_BEAM_WIDTH, share)]:
            for plan in near.grown(parent.plan.sources):
                cost = _expected_cost(parent, plan, near)
                expected[plan] = min(cost, expected.get(plan, math.inf))
        for plan in sorted(expected, key=lambda plan: (expected[plan], plan))[:share]:
            self._measure(plan)

    def _improve(
        self, count: int, near: Neighbourhood, *, leave: int, goal: float = -math.inf
    ) -> None:
        """Swap one follower or source while that helps, down to `goal`.

        `leave` measurements are left over.
        """
        level = self._measured[count]
        while (best := self._best(count)).cost.kl > goal:
            close = near.swapped(best.plan.sources) - level.keys()
            promising = sorted(close, key=lambda p: (_expected_cost(best, p, near), p))
            room = max(0, self._budget - self._count - leave)
            for plan in promising[: min(_SWAPS_AT_ONCE, room)]:
                self._measure(plan)
            if self._best(count) == best:
                return


def _expected_cost(parent: PlanCandidate, plan: Sources, near: Neighbourhood) -> float:
    """What `plan` may cost: its pairs' costs, scaled by what its parent cost beside its own."""
    before, after = near.additive_cost(parent.plan.sources), near.additive_cost(plan)
    return parent.cost.kl * after / before if before > 0 else after


def _order(candidate: PlanCandidate) -> tuple[float, Sources]:
    return candidate.cost.kl, candidate.plan.sources


def _front(best_by_count: Iterable[PlanCandidate]) -> tuple[PlanCandidate, ...]:
    """What no plan with more followers beats or equals, of each count's cheapest, ascending."""
    kept: list[PlanCandidate] = []
    for candidate in best_by_count:
        while kept and kept[-1].cost.kl >= candidate.cost.kl:
            kept.pop()
        kept.append(candidate)
    return tuple(kept)
