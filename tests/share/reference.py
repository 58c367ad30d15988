"""Sharing done from outside, on a teacher that transformers runs as it always does.

The teacher keeps its queries and keys and still computes its own probabilities, with its family's
own eager attention; a follower's are then put aside for its source's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_NUMBERS = itertools.count()


def share_by_hand(
    teacher: PreTrainedModel,
    sources: Sequence[int],
    orders: Mapping[int, Sequence[int]] | None = None,
) -> PreTrainedModel:
    """Make `teacher` use `sources`, in place, and return it.

    `orders[layer][h]` is the head of a follower that uses head `h` of its source's.
    """
    orders = orders or {}
    latest: dict[int, torch.Tensor] = {}

    def attention(
        module: Any, query: Any, key: Any, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, weights_BHST = eager(module, query, key, value, mask, **kwargs)
        layer = module.layer_idx
        latest[layer] = weights_BHST
        if sources[layer] == layer:
            return output, None
        lent_BHST = latest[sources[layer]]
        weights_BHST = torch.empty_like(lent_BHST)
        for head, user in enumerate(orders.get(layer, range(lent_BHST.shape[1]))):
            weights_BHST[:, user] = lent_BHST[:, head]
        group = weights_BHST.shape[1] // value.shape[1]
        context = weights_BHST @ value.repeat_interleave(group, dim=1)
        return context.transpose(1, 2).contiguous(), None

    name = f"by_hand_{next(_NUMBERS)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    teacher.set_attn_implementation(name)
    return teacher
