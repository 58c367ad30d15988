"""Weights that are computed when they are written, so that they are never all in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.matching import NoMatch


def weight_of(value: ir.Value | None, rank: int | None = None) -> ir.TensorProtocol:
    """An initializer's tensor, unread.

    Raises:
        NoMatch: Not an initializer, or of another rank.
    """
    name = "a missing input" if value is None else value.name
    if value is None or not value.is_initializer() or value.is_graph_input():
        raise NoMatch(f"{name} is not a weight")
    tensor = value.const_value
    if tensor is None:
        raise NoMatch(f"{name} has no data")
    if rank is not None and len(tensor.shape) != rank:
        raise NoMatch(f"{name} has {len(tensor.shape)} dimensions, not {rank}")
    return tensor


def add_lazy(
    graph: ir.Graph,
    name: str,
    compute: Callable[[], np.ndarray],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.Value:
    """Register an initializer whose elements `compute` makes each time they are needed.

    Args:
        graph: Where to.
        name: Wanted name; a number is added if it is taken.
        compute: Gives the elements in `dtype` and `shape`.
        dtype: Element type.
        shape: Its dimensions.
    """
    unique, number = name, 1
    while unique in graph.initializers:
        number += 1
        unique = f"{name}.{number}"

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(compute()), dtype=dtype, name=unique)

    tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=unique)
    value = ir.Value(
        name=unique, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register an initializer with `array`'s elements."""
    return add_lazy(graph, name, lambda: array, ir.DataType.from_numpy(array.dtype), array.shape)


def joined_name(names: Sequence[str]) -> str:
    """One name for weights that lie side by side, `layers.0.q_proj+k_proj.weight` where it can."""
    columns = list(zip(*(name.split(".") for name in names), strict=False))
    differing = [index for index, parts in enumerate(columns) if len(set(parts)) > 1]
    if len({name.count(".") for name in names}) > 1 or len(differing) != 1:
        return "+".join(names)
    return ".".join(
        "+".join(parts) if index == differing[0] else parts[0]
        for index, parts in enumerate(columns)
    )


def separate_names(joined: str) -> list[str]:
    """The names that `joined_name` made one of."""
    parts = [part.split("+") for part in joined.split(".")]
    differing = [index for index, names in enumerate(parts) if len(names) > 1]
    if len(differing) != 1:
        return joined.split("+")
    (index,) = differing
    return [
        ".".join(name if i == index else names[0] for i, names in enumerate(parts))
        for name in parts[index]
    ]
