"""Followers that compute their source's probabilities again, inside fused attention.

Shapes in names: B batch, S new tokens, T tokens attended to, H query heads, N key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from echoatt_exporter.families import family_of
from echoatt_exporter.share.modeling_echoatt import (
    ATTENTION_NAME,
    FollowerAttention,
)

# The student's attention function with SDPA's masks, which are left out where the kernel's own
# causal mode does: with this a student never meets a mask in training on full rows. It asks for a
# RecomputedAttention with every call.
RECOMPUTED_NAME = "echoatt_recomputed"
AttentionInterface.register(RECOMPUTED_NAME, AttentionInterface()[ATTENTION_NAME])
AttentionMaskInterface.register(RECOMPUTED_NAME, sdpa_mask)


@dataclass(frozen=True, slots=True)
class _Loan:
    """What a source lends instead of its probabilities: query [B, H, S, D], key [B, N, T, D]."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float


class RecomputedAttention:
    """Shared attention by `scaled_dot_product_attention`: no probabilities are ever stored.

    A follower runs the fused kernel on its source's queries and keys with its own values: the same
    probabilities, computed once more. It takes the place of `MaterializedAttention` as
    `shared_attention` of a student's forward call, with the same masks or, under
    `RECOMPUTED_NAME`, with none where attention is plainly causal.

    Args:
        sources: The sharing plan.
    """

    def __init__(self, sources: Sequence[int]) -> None:
        self.sources = sources
        self._lending = {s for layer, s in enumerate(sources) if layer != s}
        self._loans: dict[int, _Loan] = {}

    def attend(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BNTD: torch.Tensor,
        value_BNTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """See `SharedAttention.attend`.

        Raises:
            ValueError: Capped scores, which the kernel cannot do, or dropout, whose mask followers
                could not draw again.
        """
        if softcap is not None or dropout:
            raise ValueError(f"recomputed attention has no {'dropout' if dropout else 'softcap'}")
        loan = _Loan(query_BHSD, key_BNTD, mask, scaling)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in self._lending:
            self._loans[layer] = loan
        return _attend(loan, value_BNTD)

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`."""
        return _attend(self._loans[self.sources[module.layer_idx]], value_BNTD)


def _attend(loan: _Loan, value_BNTD: torch.Tensor) -> torch.Tensor:
    return fused_attention(loan.query, loan.key, value_BNTD, loan.mask, loan.scaling)


def fused_attention(
    query_BHSD: torch.Tensor,
    key_BNTD: torch.Tensor,
    value_BNTD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention output [B, S, H, D]; without a mask it is causal."""
    output_BHSD = F.scaled_dot_product_attention(
        query_BHSD,
        key_BNTD,
        value_BNTD,
        attn_mask=mask,
        # One query sees all keys; the kernel's causal mode would show it the first only
        is_causal=mask is None and query_BHSD.shape[2] > 1,
        scale=scaling,
        enable_gqa=query_BHSD.shape[1] != key_BNTD.shape[1],
    )
    return output_BHSD.transpose(1, 2)


def why_not_recomputed(config: PreTrainedConfig) -> str | None:
    """Why a decoder cannot be trained with recomputed attention; None when it can.

    Args:
        config: The teacher's configuration.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention scores are soft-capped, which fused attention cannot do"
    if getattr(config, family_of(config).dropout):
        return "attention dropout would differ between a source and its followers"
    return None
