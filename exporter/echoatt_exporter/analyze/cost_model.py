"""What any plan may cost, from the screen's estimate and what was measured of single pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.analyze.neighbourhood import Neighbourhood, Sources
from echoatt_exporter.analyze.screen import Pair, PairScreen

Floats = NDArray[np.float64]

# Plans of one follower count from which those with one more are made
_BEAM_WIDTH = 24
# How many of them are also changed in one place
_CHANGED = 4


class CostModel:
    """The cost of plans as a sum over their pairs, and over pairs of their pairs.

    A pair that was measured counts as what it cost, and what it does together with others is scaled
    with it. One that was not is taken to be as much dearer than its estimate as the measured ones
    of its follower are in the middle, or those of all followers.
    """

    def __init__(self, screen: PairScreen, num_layers: int) -> None:
        """Start from the screen's estimate alone."""
        self._pairs = screen.pairs
        self._screened = screen.gram
        self._numbers_LL = np.full((num_layers, num_layers), -1)
        for number, pair in enumerate(screen.pairs):
            self._numbers_LL[pair] = number
        self.correct({})

    def correct(self, measured: Mapping[Pair, float]) -> None:
        """Take in what pairs cost alone, nats a token, by (follower, source)."""
        estimated = np.maximum(np.diagonal(self._screened), np.finfo(np.float64).tiny)
        factors = {
            pair: measured[pair] / estimated[number]
            for number, pair in enumerate(self._pairs)
            if pair in measured
        }
        overall = float(np.median(list(factors.values()))) if factors else 1.0
        by_follower: dict[int, list[float]] = {}
        for (follower, _), factor in factors.items():
            by_follower.setdefault(follower, []).append(factor)
        usual = {follower: float(np.median(found)) for follower, found in by_follower.items()}
        scale = np.sqrt([factors.get(pair, usual.get(pair[0], overall)) for pair in self._pairs])
        self._gram = self._screened * np.outer(scale, scale)
        costs_LL = np.full(self._numbers_LL.shape, np.nan)
        for number, pair in enumerate(self._pairs):
            costs_LL[pair] = self._gram[number, number]
        self.near = Neighbourhood(costs_LL)

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
        beam, found = [self.near.unshared], []
        for _ in range(most):
            grown = {plan for parent in beam for plan in self.near.grown(parent)}
            best = self.ranked(grown)[:_CHANGED]
            grown |= {plan for parent in best for plan in self.near.swapped(parent)}
            beam = self.ranked(grown)[: max(_BEAM_WIDTH, each)]
            found.append(beam[:each])
        return found


def pairs_of(plan: Sources) -> list[Pair]:
    """A plan's (follower, source) pairs."""
    return [(layer, source) for layer, source in enumerate(plan) if layer != source]


def alone(pair: Pair, num_layers: int) -> Sources:
    """The plan in which one pair shares and no other."""
    follower, source = pair
    return tuple(source if layer == follower else layer for layer in range(num_layers))
