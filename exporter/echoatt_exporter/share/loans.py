"""What a source may lend to its followers in place of probabilities: queries and keys.

They are far smaller than probabilities, and fused attention runs on them as often as it takes.

Shapes in names: B rows of tokens, T tokens of a row, H query heads, N key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from echoatt_exporter.share.recomputed_attention import fused_attention


@dataclass(frozen=True, slots=True)
class Loan:
    """One source's attention, without its values.

    Attributes:
        query: [B, H, T, D].
        key: [B, N, T, D].
        mask: Bool, true where a query sees a key; None where attention is plainly causal.
        scaling: Of the scores.
        softcap: That scores are squeezed below; None where they are not.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None

    def rows(self, part: slice) -> Loan:
        """The loan of some of the rows."""
        return Loan(self.query[part], self.key[part], self.mask, self.scaling, self.softcap)

    def attend(self, value_BNTD: torch.Tensor) -> torch.Tensor:
        """Attention output [B, T, H, D]."""
        if self.softcap is not None:
            return context(self.probabilities(), value_BNTD)
        return fused_attention(self.query, self.key, value_BNTD, self.mask, self.scaling)

    def probabilities(self) -> torch.Tensor:
        """Attention probabilities [B, H, T, T]; softmax is computed in float32."""
        B, H, T, D = self.query.shape
        N = self.key.shape[1]
        scores = self.query.reshape(B, N, H // N * T, D) @ self.key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        seen = self.mask
        if seen is None:
            seen = torch.ones(T, T, dtype=torch.bool, device=scores.device).tril()
        scores = scores.view(B, H, T, T).masked_fill(~seen, -torch.inf)
        return scores.softmax(dim=-1, dtype=torch.float32).to(self.query.dtype)


def context(probabilities_BHTT: torch.Tensor, value_BNTD: torch.Tensor) -> torch.Tensor:
    """Probabilities times values, as [B, T, H, D]."""
    B, H, T, _ = probabilities_BHTT.shape
    N = value_BNTD.shape[1]
    mixed = probabilities_BHTT.reshape(B, N, H // N * T, T) @ value_BNTD
    return mixed.view(B, H, T, -1).transpose(1, 2)


def values_for(value_BNTD: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A follower's values as its source's heads find them, with the follower's heads in `order`.

    With `own_order` behind it, this is what a student's reordered projections do.
    """
    if not order:
        return value_BNTD
    group = len(order) // value_BNTD.shape[1]
    return value_BNTD[:, [head // group for head in order[::group]]]


def own_order(context_BTHD: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """What the source's heads gave, in the order of the follower's own heads."""
    if not order:
        return context_BTHD
    return context_BTHD[:, :, sorted(range(len(order)), key=order.__getitem__)]
