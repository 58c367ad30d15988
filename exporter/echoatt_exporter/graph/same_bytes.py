"""Initializers that are another one's bytes in another shape, and are written once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir


class SameBytes(ir.LazyTensor):
    """A tensor with the elements of another initializer in their order, in another shape.

    Operators disagree about the shape of a quantised table; its bytes are the same, and a model
    file may name one place in its external data twice.

    Attributes:
        of: The other initializer.
    """

    def __init__(self, of: ir.Value, shape: tuple[int, ...], name: str) -> None:
        """Take the initializer whose elements these are."""
        dims = ir.Shape(shape)

        def evaluate() -> ir.TensorProtocol:
            tensor = of.const_value
            assert tensor is not None  # noqa: S101 - it is an initializer
            return ir.Tensor(tensor.numpy().reshape(shape), dtype=dtype, name=name)

        assert of.dtype is not None  # noqa: S101 - initializers are typed
        dtype = of.dtype
        super().__init__(evaluate, dtype=dtype, shape=dims, name=name)
        self.of = of


def add_same_bytes(graph: ir.Graph, of: ir.Value, columns: int) -> ir.Value:
    """Register an initializer with another one's elements in rows of `columns`."""
    name = f"{of.name}.rows"
    assert of.const_value is not None  # noqa: S101 - it is an initializer
    shape = (of.const_value.size // columns, columns)
    value = ir.Value(
        name=name,
        type=ir.TensorType(of.dtype) if of.dtype is not None else None,
        shape=ir.Shape(shape),
        const_value=SameBytes(of, shape, name),
    )
    graph.register_initializer(value)
    return value


def find_same_bytes(graph: ir.Graph) -> None:
    """See again, in a graph that was read from a file, which initializers are the same bytes."""
    first: dict[tuple[str, int | None, int | None], ir.Value] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        of = first.setdefault((str(tensor.path), tensor.offset, tensor.length), value)
        if of is not value and of.dtype == value.dtype:
            shape = tuple(int(size) for size in tensor.shape.numpy())
            value.const_value = SameBytes(of, shape, str(value.name))


def apart(graph: ir.Graph) -> Iterator[ir.TensorProtocol]:
    """The initializers' tensors, of the same bytes only one."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, SameBytes):
            yield tensor


@contextmanager
def written_once(graph: ir.Graph) -> Iterator[None]:
    """Leave initializers of the same bytes out of what is written within the context.

    Afterwards they name the place where the others lie, if that is in an external file.
    """
    tensors = {
        value: value.const_value
        for value in graph.initializers.values()
        if isinstance(value.const_value, SameBytes)
    }
    for value in tensors:
        value.const_value = None
    yield
    for value, tensor in tensors.items():
        there = tensor.of.const_value
        value.const_value = tensor
        if isinstance(there, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                there.location,
                there.offset,
                there.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=there.base_dir,
            )
