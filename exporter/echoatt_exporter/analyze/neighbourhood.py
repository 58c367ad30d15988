"""From one sharing plan to the next: what the search over plans tries.

Plans are tuples of sources here, one a layer. Which layers stay sources decides nearly all: a layer
that stops being one passes its followers on to whichever source costs each of them least.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Sources = tuple[int, ...]


def admissible_pairs(sharing_kinds: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Every (follower, source) that a plan may hold: an earlier layer of the same kind."""
    for follower, kind in enumerate(sharing_kinds):
        for source in range(follower):
            if sharing_kinds[source] == kind:
                yield follower, source


class Neighbourhood:
    """The neighbourhood of a plan.

    Attributes:
        pair_costs_LL: What follower (row) after source (column) costs alone; NaN where it may not.
    """

    def __init__(self, pair_costs_LL: NDArray[np.float64]) -> None:
        self.pair_costs_LL = pair_costs_LL
        self._costs = pair_costs_LL.tolist()  # Python reads these far faster one by one
        self._earlier = [
            [source for source, cost in enumerate(row) if not math.isnan(cost)]
            for row in self._costs
        ]

    @property
    def unshared(self) -> Sources:
        """The plan without followers."""
        return tuple(range(len(self._costs)))

    def grown(self, plan: Sources) -> Iterator[Sources]:
        """Every plan in which one source more is a follower."""
        for layer, source in enumerate(plan):
            if layer == source:
                for other in self._earlier[layer]:
                    if plan[other] == other:
                        yield self._with_follower(plan, layer, other)

    def swapped(self, plan: Sources) -> set[Sources]:
        """Every plan with as many followers of which one is new or has another source."""
        return {near for freed in self._released(plan) for near in self.grown(freed)} - {plan}

    def _with_follower(self, plan: Sources, follower: int, source: int) -> Sources:
        sources = list(plan)
        sources[follower] = source
        for layer, lender in enumerate(plan):
            if lender == follower != layer:
                left = (s for s in self._earlier[layer] if sources[s] == s)
                sources[layer] = min(left, key=lambda s: (self._costs[layer][s], s))
        return tuple(sources)

    def _released(self, plan: Sources) -> Iterator[Sources]:
        """Every plan with a follower less: that layer lends to none, or to whom it costs less."""
        for follower, source in enumerate(plan):
            if follower == source:
                continue
            alone = list(plan)
            alone[follower] = follower
            lending = list(alone)
            for layer in range(follower + 1, len(plan)):
                costs, lender = self._costs[layer], plan[layer]
                if lender != layer and costs[follower] < costs[lender]:
                    lending[layer] = follower
            yield tuple(alone)
            if lending != alone:
                yield tuple(lending)
