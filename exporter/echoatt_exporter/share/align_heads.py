"""Reordering an attention module's heads, which changes its weights and not what it computes.

A follower reads its source's probabilities head by head, and no training ever lined up head 3 of
one layer with head 3 of another. Since the output projection sums over heads, their order is free:
it is chosen to suit the source and folded into the weights, at no cost at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.families import family_of
from echoatt_runtime.contract import head_order_fault
from echoatt_runtime.errors import PlanError


def reorder_heads(teacher: PreTrainedModel, layer: int, order: Sequence[int]) -> None:
    """Permute the heads of one layer's attention, in place: queries, keys, values and output.

    Rows and columns move as they are, no number is computed: the inverse order gives the first
    weights back bit for bit. The model computes the same, but for the order in which the output
    projection adds up.

    Args:
        teacher: A model for causal LM of a supported family, not a student.
        layer: Which decoder layer.
        order: The head that is put at each position, one a query head. The query heads of a
            key/value group stay together; the groups move with them.

    Raises:
        UnsupportedModelError: Another family.
        PlanError: No such layer, an order that is no permutation, or one that splits a group.
    """
    architecture = architecture_of(teacher.config)
    if not 0 <= layer < architecture.num_layers:
        raise PlanError(f"layer {layer} does not exist; there are {architecture.num_layers}")
    query_heads, kv_heads = architecture.query_heads[layer], architecture.kv_heads[layer]
    if fault := head_order_fault(order, query_heads, kv_heads):
        raise PlanError(f"layer {layer}'s head order {fault}")
    family = family_of(teacher.config)
    attention = family.attention_of(family.layers_of(teacher)[layer])
    family.reorder_heads(attention, teacher.config, order)
