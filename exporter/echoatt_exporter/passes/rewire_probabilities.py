"""Lets followers read their source's attention probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir

from echoatt_exporter.errors import PlanError
from echoatt_exporter.passes._attention import LayerAttention, check_plan, find_attention

logger = logging.getLogger(__name__)


class RewireProbabilities(ir.passes.InPlacePass):
    """Replaces a follower's own attention probabilities by its source's.

    For a graph by the contract in which layers still compute their own. It acts

    1. on the context MatMul of each follower: its first operand becomes its source's;
    2. not on a follower that reads its source's already.

    What computed the follower's own probabilities stays, and RemoveDeadBranches removes it.
    """

    def __init__(self, sources: Sequence[int]) -> None:
        """Takes the plan.

        Args:
            sources: For each layer the layer whose probabilities it uses; a source names itself.
        """
        self._sources = tuple(sources)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewire every follower.

        Raises:
            PlanError: The plan does not fit the graph: its length, or head counts that differ.
            ContractError: A layer's attention is not where the contract has it.
        """
        plan = check_plan(model.graph, self._sources)
        layers = [find_attention(model.graph, layer) for layer in range(plan.num_layers)]
        pairs = [(layers[layer], layers[plan.sources[layer]]) for layer in plan.followers]
        for follower, source in pairs:
            _check_shapes(follower, source)
        modified = False
        for follower, source in pairs:
            if follower.probabilities is source.probabilities:
                logger.debug("layer %d reads its source's already", follower.layer)
                continue
            follower.context.replace_input_with(0, source.probabilities)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _check_shapes(follower: LayerAttention, source: LayerAttention) -> None:
    """Refuse to swap tensors of different shapes.

    Only what the graph knows of both can be compared. Symbolic sizes are expressions over the same
    graph's inputs, so two that read differently mean different sizes.
    """
    mine, theirs = follower.probabilities.shape, source.probabilities.shape
    if mine is None or theirs is None:
        return
    equal = len(mine) == len(theirs) and all(
        str(a) == str(b)
        for axis, (a, b) in enumerate(zip(mine, theirs, strict=True))
        if not (mine.is_unknown_dim(axis) or theirs.is_unknown_dim(axis))
    )
    if not equal:
        raise PlanError(
            f"layer {follower.layer} cannot use layer {source.layer}'s probabilities: they are "
            f"{theirs} and its own {mine}; choose a source with the same head counts"
        )
