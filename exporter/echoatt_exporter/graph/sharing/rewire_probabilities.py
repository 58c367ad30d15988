"""Lets followers read their source's attention probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir

from echoatt_exporter.graph.attention import LayerAttention, check_plan, find_attention
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.properties import Property
from echoatt_runtime.errors import PlanError

logger = logging.getLogger(__name__)


class RewireProbabilities(GraphPass):
    """Replaces a follower's own attention probabilities by its source's.

    For a graph by the contract in which layers still compute their own. It acts

    1. on the context MatMul of each follower: its first operand becomes its source's;
    2. not on a follower that reads its source's already.

    What computed the follower's own probabilities stays, and RemoveDeadBranches removes it.
    """

    needs = frozenset({Property.NO_BRANCHES})
    gives = frozenset({Property.PLAN_APPLIED})
    breaks = GraphPass.breaks | {Property.NO_DEAD_KEYS}

    def __init__(self, sources: Sequence[int]) -> None:
        """Take the plan.

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
    """Refuse to swap tensors whose shapes are known to differ."""
    mine, theirs = follower.probabilities.shape, source.probabilities.shape
    if mine is None or theirs is None:
        return
    if len(mine) != len(theirs) or any(map(_differ, mine, theirs)):
        raise PlanError(
            f"layer {follower.layer} cannot use layer {source.layer}'s probabilities: they are "
            f"{theirs} and its own {mine}; choose a source with the same head counts"
        )


def _differ(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    """Whether two sizes cannot be equal.

    Expressions can be compared only if they are of the same symbols, such as 2*seq and 4*seq:
    shape inference gives a size that it cannot express a symbol of its own, different in each
    layer.
    """
    if isinstance(left, int) and isinstance(right, int):
        return left != right
    if isinstance(left, int) or isinstance(right, int):
        return False
    symbols = left.free_symbols()
    if not symbols or symbols != right.free_symbols():
        return False
    return str(left.simplify()) != str(right.simplify())
