"""Roles of weights: what each column of a weight is for, as metadata on the initializer.

A role is there while passes run and is gone from what is published. Passes that pack, cut, quantise
or replace a weight hand its role on.
"""

from __future__ import annotations

import enum
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

_KEY: Final = "echoatt.role"

_PACKED_TYPES: Final = (
    ir.DataType.UINT8,
    ir.DataType.INT8,
    ir.DataType.UINT4,
    ir.DataType.INT4,
)


class Kind(enum.Enum):
    """What a column is for."""

    QUERIES = "queries"
    KEYS = "keys"
    VALUES = "values"
    OUTPUT = "output"
    FEED_FORWARD = "feed_forward"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    POSITIONS = "positions"


@dataclass(frozen=True, slots=True)
class Use:
    """One thing that a column is for.

    Attributes:
        kind: What.
        layer: In which layer; None where that is not told apart.
    """

    kind: Kind
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A run of columns with the same uses.

    Attributes:
        uses: What they are for; none if that is not known.
        columns: Their number. A table's are its rows, a norm's its elements.
    """

    uses: frozenset[Use]
    columns: int


# In order. A weight that is packed by head has its parts once for each head.
Role = tuple[Part, ...]


def is_weight(value: ir.Value) -> bool:
    """Whether an initializer is a weight, and not a constant of shapes, axes or factors."""
    tensor = value.const_value
    if tensor is None or tensor.size <= 1:
        return False
    return tensor.dtype.is_floating_point() or tensor.dtype in _PACKED_TYPES


def role_of(value: ir.Value) -> Role:
    """A weight's role; no parts if nobody has given it one."""
    text = value.metadata_props.get(_KEY)
    if text is None:
        return ()
    return tuple(
        Part(frozenset(Use(Kind(kind), layer) for kind, layer in uses), columns)
        for uses, columns in json.loads(text)
    )


def set_role(value: ir.Value, role: Iterable[Part]) -> None:
    """Give a weight a role; one without parts takes it away."""
    merged: list[Part] = []
    for part in role:
        if merged and merged[-1].uses == part.uses:
            part = Part(part.uses, merged.pop().columns + part.columns)
        merged.append(part)
    if not merged:
        value.metadata_props.pop(_KEY, None)
        return
    data = [
        (sorted(((use.kind.value, use.layer) for use in part.uses), key=str), part.columns)
        for part in merged
    ]
    value.metadata_props[_KEY] = json.dumps(data)


def add_use(value: ir.Value, use: Use, total: int, columns: np.ndarray | None = None) -> None:
    """Say of some of a weight's columns that they serve a use too.

    Args:
        value: The weight.
        use: The use.
        total: How many columns there are.
        columns: Mask [total] of those that serve it; None for all.
    """
    role = role_of(value) or (Part(frozenset(), total),)
    more = np.ones(total, bool) if columns is None else columns
    set_role(value, _union(role, _runs(more, frozenset({use}))))


def join_roles(roles: Iterable[tuple[Role, int]]) -> Role:
    """The role of weights that lie side by side, from each one's and its number of columns."""
    joined: list[Part] = []
    for role, columns in roles:
        joined += role or (Part(frozenset(), columns),)
    return tuple(joined)


def unite_roles(one: Role, other: Role) -> Role:
    """The role of a weight that takes another's place too; what is known of either's columns."""
    if sum(part.columns for part in one) != sum(part.columns for part in other):
        return ()
    return _union(one, other)


def take_columns(role: Role, columns: np.ndarray) -> Role:
    """The role of some columns, given by their numbers."""
    which = np.repeat(np.arange(len(role)), [part.columns for part in role])
    return tuple(Part(role[index].uses, 1) for index in which[columns]) if role else ()


def _runs(mask: np.ndarray, uses: frozenset[Use]) -> Role:
    """Columns that serve `uses` where the mask says so, and nothing elsewhere."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return tuple(
        Part(uses if mask[begin] else frozenset(), end - begin)
        for begin, end in itertools.pairwise(edges)
    )


def _union(one: Role, other: Role) -> Role:
    """Each column's uses in either; both have as many columns."""
    ends = [np.cumsum([part.columns for part in role]) for role in (one, other)]
    edges = np.unique(np.concatenate([[0], *ends]))
    parts = []
    for begin, end in itertools.pairwise(edges.tolist()):
        first, second = (
            role[int(np.searchsorted(of_role, begin, side="right"))]
            for role, of_role in zip((one, other), ends, strict=True)
        )
        parts.append(Part(first.uses | second.uses, end - begin))
    return tuple(parts)
