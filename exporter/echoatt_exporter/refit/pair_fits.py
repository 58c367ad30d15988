"""Output projections for every follower and source, each fitted on the teacher's own states.

What a layer's output projection should be when it attends by another layer's probabilities depends
on these two layers and on nothing else of a plan. So all pairs can be fitted in one walk, before
there is a plan, and plans be judged by what they cost once they are re-fitted.

Shapes in names: W windows, T tokens, K = H·D inputs of an output projection, N its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.families import family_of
from echoatt_exporter.refit.layer_walk import LayerWalk
from echoatt_exporter.refit.projection_calls import Projection, changed_copy, recording
from echoatt_exporter.refit.weighted_fit import WeightedFit
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.loans import own_order, values_for
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME
from echoatt_runtime.contract import SharingPlan

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class PairFits:
    """What was fitted.

    Attributes:
        projections: By follower and source, an output projection of its own; pairs of which nothing
            was learned that holds on other text have none.
    """

    projections: Mapping[Pair, Projection]

    def of(self, layer: int, source: int, own: nn.Module) -> nn.Module:
        """A follower's output projection, given the one that the teacher has."""
        return self.projections.get((layer, source), own)


@torch.no_grad()
def fit_pairs(
    teacher: PreTrainedModel,
    windows_WT: torch.Tensor,
    plans: Sequence[SharingPlan],
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
) -> PairFits:
    """Fit every follower of some plans to its source.

    Args:
        teacher: A decoder of a supported family; it is left as it was.
        windows_WT: Text to fit on, int64.
        plans: Each follower's heads in the order that they have there. A pair has the same order in
            all of them.
        on_layer: Told (layers done, layers in all).
    """
    orders = {
        (layer, plan.sources[layer]): plan.head_order(layer)
        for plan in plans
        for layer in plan.followers
    }
    family = family_of(teacher.config)
    layers = family.layers_of(teacher)
    last_borrowers = {source: layer for layer, source in sorted(orders)}
    projections: dict[Pair, Projection] = {}
    with lending_attention(teacher, RECOMPUTED_NAME):
        walk = LayerWalk(teacher, range(len(layers)), windows_WT, last_borrowers)
        for layer in range(max((layer for layer, _ in orders), default=-1) + 1):
            own = family.output_of(family.attention_of(layers[layer]))
            fits = {pair: WeightedFit(own) for pair in sorted(orders) if pair[0] == layer}
            for rows in walk.batches if fits else ():
                with recording(own) as call:
                    look = walk.look(rows)
                for pair, fit in fits.items():
                    order = orders[pair]
                    value_BNTD = values_for(look.values, order)
                    context_BTHD = own_order(look.loans[pair[1]].attend(value_BNTD), order)
                    context_BTK = context_BTHD.flatten(2)
                    fit.add(context_BTK, call.output - own(context_BTK), call.output)
            for pair, fit in fits.items():
                found = fit.solve()
                if found.left < 1:
                    projections[pair] = changed_copy(own, found.change)
            walk.advance()
            on_layer(layer + 1, len(layers))
    return PairFits(projections)
