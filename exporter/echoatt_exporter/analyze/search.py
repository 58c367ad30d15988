"""Choose a sharing plan by what it costs: pairs are estimated, the best of them and plans measured.

All pairs are estimated at once from a few gradients, alone and together (`screen`). From that come
the plans that may cost least for each number of followers (`cost_model`); their pairs are measured
and the estimate is corrected, until the plans hold no pair that was not. Then plans are measured on
a few windows, one follower more at a time, and what is measured is learned from; the best of each
count are measured on all windows. Costs of plans are always measured in the end: the
estimate says where to look, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from echoatt_exporter.analyze.candidates import PlanCandidate, PlanSearch, front_of
from echoatt_exporter.analyze.cost_model import CostModel, alone, pairs_of
from echoatt_exporter.analyze.footprint import DecoderSize
from echoatt_exporter.analyze.match_heads import align_plan
from echoatt_exporter.analyze.neighbourhood import Sources, admissible_pairs
from echoatt_exporter.analyze.probe import PlanCost, PlanProbe
from echoatt_exporter.analyze.screen import OnScreened, Pair, PairScreen, screen_pairs
from echoatt_exporter.analyze.similarity import HeadSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.contract import SharingPlan

# Plans of each follower count whose pairs are measured, and how often the estimate is corrected
_PLANS_TO_CORRECT, _CORRECTIONS = 4, 4
# Plans that are measured on a few windows: of each follower count up to the one that was asked for,
# of that one, and of each behind it; and those of one count from which the next are made
_TRIED, _TRIED_OF_WANTED, _TRIED_BEHIND, _PARENTS = 6, 10, 3, 4
# Plans measured at a time to improve the best one, and how often
_SWAPS_AT_ONCE, _SWAPS = 6, 4
# Plans that are measured on all windows in the end: of each count, and of the one asked for
_FINALISTS, _FINALISTS_OF_WANTED = 1, 4
_DEFAULT_CONTEXT = 2048

# Told what is measured ("pairs", "plans" or "best plans"), and how much of it is done, of how much:
# runs of a plan on a batch of windows, or for "plans" plans, of so many at most
OnSearch = Callable[[str, int, int], None]


def _ignore(_step: str, _done: int, _total: int) -> None:
    pass


def search_plans(
    probe: PlanProbe,
    architecture: DecoderArchitecture,
    config: PreTrainedConfig,
    *,
    ratio: float | None = None,
    max_kl: float | None = None,
    max_ratio: float | None = None,
    head_similarity: HeadSimilarity | None = None,
    context: int | None = None,
    bytes_per_element: float = 2.0,
    screen: PairScreen | None = None,
    on_step: OnSearch = _ignore,
) -> PlanSearch:
    """Find a cheap plan for a sharing ratio, or the largest ratio for a cost.

    The same arguments give the same result, and so does a probe that has measured some of it.

    Args:
        probe: Measures on the teacher.
        architecture: The teacher's.
        config: The teacher's.
        ratio: Followers / layers wanted, rounded to a whole number of followers, at least one.
        max_kl: Instead of `ratio`: the most that the plan may cost, nats a token.
        max_ratio: How far the front goes if further than `ratio`; with `max_kl` the largest
            ratio that is tried, by default all.
        head_similarity: Where given, every follower's heads are lined up with its source's.
        context: Tokens that the footprints count with; by default 2048, or what the model has.
        bytes_per_element: That the footprints count with.
        screen: From `screen_for` with the same probe and head similarity; by default made here.
        on_step: Called as the search goes on.

    Raises:
        AnalysisError: No plan can be what is asked for.
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
    if context is None:
        context = min(_DEFAULT_CONTEXT, architecture.context_length)
    size = DecoderSize.of(config)
    size.with_plan(
        SharingPlan.unshared(architecture.num_layers),
        context=context,
        bytes_per_element=bytes_per_element,
    )

    def candidate_of(plan: SharingPlan, cost: PlanCost) -> PlanCandidate:
        footprint = size.with_plan(plan, context=context, bytes_per_element=bytes_per_element)
        return PlanCandidate(plan, cost, footprint)

    plan_of = _plan_maker(architecture, head_similarity)
    if screen is None:
        screen = screen_for(probe, head_similarity)
    return _Search(probe, screen, plan_of, candidate_of, on_step).run(wanted, max_kl, last)


def screen_for(
    probe: PlanProbe,
    head_similarity: HeadSimilarity | None = None,
    *,
    begun: tuple[int, NDArray[np.float64]] | None = None,
    on_batch: OnScreened | None = None,
) -> PairScreen:
    """Estimate what every admissible pair of a probe's teacher costs on the probe's windows.

    Args:
        probe: Of the teacher.
        head_similarity: As in `search_plans`.
        begun: As in `screen_pairs`.
        on_batch: As in `screen_pairs`.
    """
    plans = pair_plans(probe.architecture, head_similarity)
    return screen_pairs(
        probe.teacher, probe.windows, plans, fits=probe.fits, begun=begun, on_batch=on_batch
    )


def pair_plans(
    architecture: DecoderArchitecture, head_similarity: HeadSimilarity | None = None
) -> list[SharingPlan]:
    """A plan of one follower for every admissible pair.

    Args:
        architecture: The teacher's.
        head_similarity: As in `search_plans`.
    """
    plan_of = _plan_maker(architecture, head_similarity)
    pairs = admissible_pairs(architecture.sharing_kinds)
    return [plan_of(alone(pair, architecture.num_layers)) for pair in pairs]


def _plan_maker(
    architecture: DecoderArchitecture, head_similarity: HeadSimilarity | None
) -> Callable[[Sources], SharingPlan]:
    """What makes a plan of sources, with its heads lined up where that is asked for."""

    def plan_of(sources: Sources) -> SharingPlan:
        plan = SharingPlan(sources)
        if head_similarity is None:
            return plan
        return align_plan(plan, head_similarity, architecture)

    return plan_of


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


def _tries(count: int, wanted: int | None) -> int:
    """How many plans of a count are measured."""
    if wanted is None or count < wanted:
        return _TRIED
    return _TRIED_OF_WANTED if count == wanted else _TRIED_BEHIND


class _Search:
    """One search: what has been measured, and what it says of the rest."""

    def __init__(
        self,
        probe: PlanProbe,
        screen: PairScreen,
        plan_of: Callable[[Sources], SharingPlan],
        candidate_of: Callable[[SharingPlan, PlanCost], PlanCandidate],
        on_step: OnSearch,
    ) -> None:
        self._probe = probe
        self._layers = probe.architecture.num_layers
        self._model = CostModel(screen, self._layers)
        self._plan_of = plan_of
        self._candidate_of = candidate_of
        self._on_step = on_step
        self._pairs: set[Pair] = set()
        self._tried: dict[int, dict[Sources, float]] = {}  # by follower count, on few windows
        self._done = self._most = 0  # plans measured, and at most to measure, for who waits
        self._level = [self._model.near.unshared]  # of the last count, what may cost least
        self._judged: dict[int, dict[Sources, PlanCandidate]] = {}  # on all of them

    def run(self, wanted: int | None, max_kl: float | None, last: int) -> PlanSearch:
        """Measure pairs, then plans of up to `last` followers; see `search_plans`."""
        self._correct(last)
        self._most = sum(_tries(count, wanted) for count in range(1, last + 1))
        self._most += _SWAPS * _SWAPS_AT_ONCE
        chosen = None
        for count in range(1, last + 1):
            self._try(count, _tries(count, wanted))
            if count == wanted:
                self._improve(count)
            if max_kl is not None:
                self._judge([count], wanted)
                if self._best(count).cost.kl > max_kl:
                    self._improve(count)
                    self._judge([count], wanted)
                if self._best(count).cost.kl > max_kl:
                    break
                chosen = self._best(count)
        if max_kl is None:
            self._judge(range(1, last + 1), wanted)
        if wanted is not None:
            chosen = self._best(wanted)
        if chosen is None:
            cheapest = self._best(1)
            (follower,) = cheapest.plan.followers
            raise AnalysisError(
                f"no plan stays within a KL of {max_kl}: the cheapest, layer {follower} after layer"
                f" {cheapest.plan.sources[follower]}, costs {cheapest.cost.kl:.3g}; allow more"
            )
        costs_LL = self._model.pair_costs.copy()
        measured_LL = np.zeros(costs_LL.shape, dtype=np.bool_)
        for plan, kl in self._tried[1].items():
            (pair,) = pairs_of(plan)
            costs_LL[pair], measured_LL[pair] = kl, True
        judged = sorted(self._judged.items())
        return PlanSearch(
            pair_costs=costs_LL,
            pair_measured=measured_LL,
            candidates=tuple(
                candidate
                for _, level in judged
                for candidate in sorted(level.values(), key=lambda one: one.order)
            ),
            front=front_of(self._best(count) for count, _ in judged),
            chosen=chosen,
            tried=len({plan for level in self._tried.values() for plan in level}),
        )

    def _correct(self, last: int) -> None:
        """Measure the pairs of the plans that may cost least, and correct the estimate by them."""
        for _ in range(_CORRECTIONS):
            levels = self._model.cheapest(last, _PLANS_TO_CORRECT)
            pairs = {pair for level in levels for plan in level for pair in pairs_of(plan)}
            # By follower from the last, so that what was measured when it is stopped is of use
            new = sorted(pairs - self._pairs, reverse=True)
            if not new:
                return
            self._measure([alone(pair, self._layers) for pair in new], "pairs")
            self._pairs |= set(new)

    def _try(self, count: int, plans: int) -> None:
        """Measure on a few windows what may cost least of a count."""
        parents = self._tried.get(count - 1, {})
        best = sorted(parents, key=lambda plan: (parents[plan], plan))[:_PARENTS]
        self._level = self._model.grown([*self._level, *best])
        self._measure(self._level[:plans], "plans")

    def _improve(self, count: int) -> None:
        """Change the best plan in one place while that helps."""
        for _ in range(_SWAPS):
            level = self._tried[count]
            best = min(level, key=lambda plan: (level[plan], plan))
            close = self._model.near.swapped(best) - level.keys()
            self._measure(self._model.ranked(close)[:_SWAPS_AT_ONCE], "plans")
            if best == min(level, key=lambda plan: (level[plan], plan)):
                return

    def _judge(self, counts: Iterable[int], wanted: int | None) -> None:
        """Measure the best plans of each count on all windows."""
        plans = []
        for count in counts:
            level = self._tried[count]
            finalists = _FINALISTS_OF_WANTED if count == wanted else _FINALISTS
            plans += sorted(level, key=lambda plan: (level[plan], plan))[:finalists]
        made = [self._plan_of(sources) for sources in plans]
        costs = self._probe.measure_all(
            made, on_run=lambda done, total: self._on_step("best plans", done, total)
        )
        for plan, cost in zip(made, costs, strict=True):
            judged = self._judged.setdefault(len(plan.followers), {})
            judged[plan.sources] = self._candidate_of(plan, cost)

    def _measure(self, sources: Sequence[Sources], step: str) -> None:
        """Measure plans on a few windows, and learn from it what others may cost."""

        def on_run(done: int, total: int) -> None:
            if step == "plans":  # of which there are many small calls
                done = self._done + len(sources) * done // total
                total = max(done, self._most)
            self._on_step(step, done, total)

        plans = [self._plan_of(plan) for plan in sources]
        costs = self._probe.measure_all(plans, few=True, on_run=on_run)
        self._done += len(sources) if step == "plans" else 0
        for plan, cost in zip(sources, costs, strict=True):
            self._tried.setdefault(len(pairs_of(plan)), {})[plan] = cost.kl
        self._model.learn({p: kl for level in self._tried.values() for p, kl in level.items()})

    def _best(self, count: int) -> PlanCandidate:
        """The cheapest of the plans with `count` followers that were measured on all windows."""
        return min(self._judged[count].values(), key=lambda one: one.order)
