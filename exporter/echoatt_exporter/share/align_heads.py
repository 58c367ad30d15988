"""Reordering an attention module's heads, which changes its weights and not what it computes.

A follower reads its source's probabilities head by head, and no training ever lined up head 3 of
one layer with head 3 of another. Since the output projection sums over heads, their order is free:
it is chosen to suit the source and folded into the weights, at no cost at run time.

Shapes in names: H query heads, N key/value heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.share.modeling_echoatt import FAMILIES
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
    query_heads, kv_heads = architecture.num_query_heads, architecture.num_kv_heads
    if fault := head_order_fault(order, query_heads, kv_heads):
        raise PlanError(f"layer {layer}'s head order {fault}")
    family = FAMILIES[architecture.family]
    layers = cast(nn.ModuleList, teacher.get_submodule(family.layers))
    attention: Any = getattr(layers[layer], family.attention)
    output: nn.Linear = getattr(attention, family.output)

    head_dim = output.in_features // query_heads
    group = query_heads // kv_heads
    query = _elements(order, head_dim)
    key = _elements([head // group for head in order[::group]], head_dim)
    if family.values == "separate":
        for name, moved in (("q", query), ("k", key), ("v", key)):
            projection: nn.Linear = getattr(attention, f"{name}_proj")
            _take_rows(projection, moved)
            norm: nn.Module | None = getattr(attention, f"{name}_norm", None)
            # A norm is either over all heads at once, or one for every head
            if norm is not None and cast(torch.Tensor, norm.weight).numel() == len(moved):
                _take_rows(norm, moved)
    elif family.values == "blocked":  # queries, keys, values
        first_value = len(query) + len(key)
        _take_rows(attention.qkv_proj, torch.cat([query, len(query) + key, first_value + key]))
    else:  # each head's query, key and value side by side
        _take_rows(attention.query_key_value, _elements(order, 3 * head_dim))
    output.weight.data = output.weight.data.index_select(1, query.to(output.weight.device))


def _elements(order: Sequence[int], size: int) -> torch.Tensor:
    """Indice [heads · size] of the elements of heads of `size`, in the order of `order`."""
    return (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()


def _take_rows(module: nn.Module, rows: torch.Tensor) -> None:
    """Permute the rows of a projection or norm, and of its bias."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            parameter.data = parameter.data.index_select(0, rows.to(parameter.device))
