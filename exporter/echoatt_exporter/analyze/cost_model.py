"""What any plan may cost, from the screen's estimate and what was measured of single pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.analyze.neighbourhood import Neighbourhood, Sources
from echoatt_exporter.analyze.screen import Pair, PairScreen

Floats = NDArray[np.float64]

# Of fitting: what holds a factor's logarithm back, how much more a plan counts than a pair alone
# (plans are what is to be told apart), and how often the slopes are taken anew
_HOLD, _WEIGHT_OF_PLANS, _STEPS = 0.1, 10.0, 6

# Plans of one follower count from which those with one more are made
_BEAM_WIDTH = 24
# How many of them are also changed in one place
_CHANGED = 4


class CostModel:
    """The cost of plans as a sum over their pairs, and over pairs of their pairs.

    Each pair has a factor that its estimated effect is multiplied with. They are fitted to what was
    measured, of single pairs and of whole plans: by least squares of the costs' logarithms, held
    near to what pairs alone say. A pair that was not measured alone is taken to be as much dearer
    than its estimate as the measured ones of its follower are in the middle, or those of all.
    """

    def __init__(self, screen: PairScreen, num_layers: int) -> None:
        """Start from the screen's estimate alone."""
        self._pairs = screen.pairs
        self._screened = screen.gram
        self._numbers_LL = np.full((num_layers, num_layers), -1)
        for number, pair in enumerate(screen.pairs):
            self._numbers_LL[pair] = number
        self.learn({})

    def learn(self, measured: Mapping[Sources, float]) -> None:
        """Take in what plans cost, nats a token; everything measured so far, each time anew."""
        plans = {plan: cost for plan, cost in measured.items() if cost > 0}
        usual_P = self._usual_factors(
            {pairs[0]: cost for plan, cost in plans.items() if len(pairs := pairs_of(plan)) == 1}
        )
        factors_P = self._fitted(plans, usual_P) if plans else usual_P
        self._gram = self._screened * np.outer(factors_P, factors_P)
        costs_LL = np.full(self._numbers_LL.shape, np.nan)
        for number, pair in enumerate(self._pairs):
            costs_LL[pair] = self._gram[number, number]
        self.near = Neighbourhood(costs_LL)

    def _usual_factors(self, alone: Mapping[Pair, float]) -> Floats:
        """Factors of effects from the pairs that were measured alone; their squares are costs'."""
        estimated = np.maximum(np.diagonal(self._screened), np.finfo(np.float64).tiny)
        ratios = {
            pair: alone[pair] / estimated[number]
            for number, pair in enumerate(self._pairs)
            if pair in alone
        }
        overall = float(np.median(list(ratios.values()))) if ratios else 1.0
        by_follower: dict[int, list[float]] = {}
        for (follower, _), ratio in ratios.items():
            by_follower.setdefault(follower, []).append(ratio)
        usual = {follower: float(np.median(found)) for follower, found in by_follower.items()}
        return np.sqrt([ratios.get(pair, usual.get(pair[0], overall)) for pair in self._pairs])

    def _fitted(self, plans: Mapping[Sources, float], usual_P: Floats) -> Floats:
        """Factors that fit the plans, by a few steps of Gauss and Newton."""
        numbers = [[self._numbers_LL[pair] for pair in pairs_of(plan)] for plan in plans]
        used = sorted({number for row in numbers for number in row})  # the others stay as they are
        place = {number: column for column, number in enumerate(used)}
        columns = [[place[number] for number in row] for row in numbers]
        gram = self._screened[np.ix_(used, used)] * np.outer(usual_P[used], usual_P[used])
        wanted_M = np.log(list(plans.values()))
        weights_M = np.array([_WEIGHT_OF_PLANS if len(row) > 1 else 1.0 for row in numbers])
        logs = np.zeros(len(used))
        for _ in range(_STEPS):
            factors = np.exp(logs)
            found_M, slopes = np.zeros(len(plans)), np.zeros((len(plans), len(used)))
            for number, row in enumerate(columns):
                pulls = factors[row] * (gram[np.ix_(row, row)] @ factors[row])
                total = max(float(pulls.sum()), np.finfo(np.float64).tiny)
                found_M[number] = np.log(total)
                slopes[number, row] = 2 * pulls / total
            weighted = slopes * weights_M[:, None]
            logs = np.linalg.solve(
                weighted.T @ slopes + _HOLD * np.eye(len(used)),
                weighted.T @ (wanted_M - found_M + slopes @ logs),
            )
        factors_P = usual_P.copy()
        factors_P[used] *= np.exp(logs)
        return factors_P

    @property
    def pair_costs(self) -> Floats:
        """[L, L]: what follower (row) after source (column) costs alone; NaN where it may not."""
        return self.near.pair_costs_LL

    def costs(self, plans: Sequence[Sources]) -> Floats:
        """What plans with equally many followers may cost, nats a token."""
        if not plans:
            return np.zeros(0)
        sources_ML = np.array(plans)
        layers_ML = np.broadcast_to(np.arange(sources_ML.shape[1]), sources_ML.shape)
        follows_ML = sources_ML != layers_ML
        numbers_MF = self._numbers_LL[layers_ML[follows_ML], sources_ML[follows_ML]].reshape(
            len(plans), -1
        )
        totals = np.zeros(len(plans))
        for column_M in numbers_MF.T:  # a square of all columns would take L times the memory
            totals += self._gram[column_M[:, None], numbers_MF].sum(axis=1)
        return totals

    def ranked(self, plans: set[Sources]) -> list[Sources]:
        """Plans with equally many followers from cheap to dear."""
        listed = sorted(plans)
        costs = self.costs(listed)
        return [listed[number] for number in np.argsort(costs, kind="stable")]

    def cheapest(self, most: int, each: int) -> list[list[Sources]]:
        """For 1 to `most` followers the plans that may cost least, `each` of every count.

        A count has fewer where there are no more.
        """
        level, found = [self.near.unshared], []
        for _ in range(most):
            level = self.grown(level)
            found.append(level[:each])
        return found

    def grown(self, plans: Iterable[Sources]) -> list[Sources]:
        """Of plans with one follower more than `plans` have, those that may cost least."""
        found = {plan for parent in plans for plan in self.near.grown(parent)}
        best = self.ranked(found)[:_CHANGED]
        found |= {plan for parent in best for plan in self.near.swapped(parent)}
        return self.ranked(found)[:_BEAM_WIDTH]


def pairs_of(plan: Sources) -> list[Pair]:
    """A plan's (follower, source) pairs."""
    return [(layer, source) for layer, source in enumerate(plan) if layer != source]


def alone(pair: Pair, num_layers: int) -> Sources:
    """The plan in which one pair shares and no other."""
    follower, source = pair
    return tuple(source if layer == follower else layer for layer in range(num_layers))
