"""How an attention module stores the projections of queries, keys and values.

Shapes in names: H query heads, N key/value heads, G = H / N query heads a group, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from echoatt_exporter.families.projections import cut_outputs, take_outputs


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The heads of one layer.

    Attributes:
        query: H, its query heads.
        key_value: N, its key/value heads.
        size: D, elements a head.
    """

    query: int
    key_value: int
    size: int

    @property
    def group(self) -> int:
        """G, the query heads that share keys and values."""
        return self.query // self.key_value


class HeadLayout(Protocol):
    """Where an attention module keeps its queries, keys and values."""

    @property
    def values(self) -> str:
        """Name of the module that projects the values, whatever else it projects."""

    def cut_values(self, attention: nn.Module, heads: LayerHeads) -> nn.Linear:
        """The value projection [N·D, E] alone."""

    def value_outputs(self, heads: LayerHeads) -> torch.Tensor:
        """Which outputs of the module `values` are values, int64 [N·D]."""

    def reorder(self, attention: nn.Module, heads: LayerHeads, order: Sequence[int]) -> None:
        """Permute the heads of queries, keys and values in place.

        Args:
            attention: The module.
            heads: Its heads.
            order: [H], the query head that is put at each position; groups stay whole.
        """


@dataclass(frozen=True)
class SeparateHeads:
    """Three projections, and norms of queries and keys where there are any.

    Attributes:
        queries: Name of the query projection.
        keys: Name of the key projection.
        values: Name of the value projection.
        norms: Names of the norms of queries and of keys, which a family may lack.
    """

    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    norms: tuple[str, str] = ("q_norm", "k_norm")

    def cut_values(self, attention: nn.Module, heads: LayerHeads) -> nn.Linear:  # noqa: ARG002
        """The module's own value projection."""
        separate: nn.Linear = getattr(attention, self.values)
        return separate

    def value_outputs(self, heads: LayerHeads) -> torch.Tensor:
        """All of them."""
        return torch.arange(heads.key_value * heads.size)

    def reorder(self, attention: nn.Module, heads: LayerHeads, order: Sequence[int]) -> None:
        """See `HeadLayout.reorder`."""
        query, key = query_elements(heads, order), _key_elements(heads, order)
        for name, moved in ((self.queries, query), (self.keys, key), (self.values, key)):
            take_outputs(getattr(attention, name), moved)
        for name, moved in zip(self.norms, (query, key), strict=True):
            norm: nn.Module | None = getattr(attention, name, None)
            # A norm is either over all heads at once, or one for every head
            if norm is not None and cast(torch.Tensor, norm.weight).numel() == len(moved):
                take_outputs(norm, moved)


@dataclass(frozen=True)
class _PackedHeads:
    """One projection of queries, keys and values.

    Attributes:
        values: Its name.
    """

    values: str

    def parts(self, heads: LayerHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which of the projection's outputs are queries [H·D], keys [N·D] and values [N·D]."""
        raise NotImplementedError

    def cut_values(self, attention: nn.Module, heads: LayerHeads) -> nn.Linear:
        """A copy of the outputs that are values."""
        return cut_outputs(getattr(attention, self.values), self.value_outputs(heads))

    def value_outputs(self, heads: LayerHeads) -> torch.Tensor:
        """See `HeadLayout.value_outputs`."""
        return self.parts(heads)[2]

    def reorder(self, attention: nn.Module, heads: LayerHeads, order: Sequence[int]) -> None:
        """See `HeadLayout.reorder`."""
        key = _key_elements(heads, order)
        moved = torch.empty((heads.query + 2 * heads.key_value) * heads.size, dtype=torch.int64)
        moves = (query_elements(heads, order), key, key)
        for part, move in zip(self.parts(heads), moves, strict=True):
            moved[part] = part[move]
        take_outputs(getattr(attention, self.values), moved)


class BlockedHeads(_PackedHeads):
    """All queries, then all keys, then all values, in one projection."""

    def parts(self, heads: LayerHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `_PackedHeads.parts`."""
        queries, keys = heads.query * heads.size, heads.key_value * heads.size
        first_value = queries + keys
        elements = torch.arange(first_value + keys)
        return elements[:queries], elements[queries:first_value], elements[first_value:]


class InterleavedHeads(_PackedHeads):
    """Group after group in one projection, each with its queries, its key and its value."""

    def parts(self, heads: LayerHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `_PackedHeads.parts`."""
        count = heads.key_value * (heads.group + 2) * heads.size
        by_group = torch.arange(count).view(heads.key_value, heads.group + 2, heads.size)
        group = heads.group
        return (
            by_group[:, :group].flatten(),
            by_group[:, group].flatten(),
            by_group[:, group + 1].flatten(),
        )


def query_elements(heads: LayerHeads, order: Sequence[int]) -> torch.Tensor:
    """Which query element is put at each position, int64 [H·D], when heads are put in an order."""
    return _elements(order, heads.size)


def _key_elements(heads: LayerHeads, order: Sequence[int]) -> torch.Tensor:
    """The same for keys and values, int64 [N·D]: the groups move with their query heads."""
    return _elements([head // heads.group for head in order[:: heads.group]], heads.size)


def _elements(order: Sequence[int], size: int) -> torch.Tensor:
    return (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()
