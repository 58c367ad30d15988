"""What a run reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from echoatt_runtime.contract import ElementType


class Binding:
    """The memory that a run reads and writes.

    Memory that is named by its address must live as long as it is bound.

    Attributes:
        io_binding: ONNX Runtime's own.
    """

    def __init__(self, io_binding: Any) -> None:
        self.io_binding = io_binding
        # ONNX Runtime gives outputs in the order in which they were first bound
        self._order: dict[str, int] = {}

    def bind_input(
        self, name: str, device: str, elements: ElementType, shape: Sequence[int], address: int
    ) -> None:
        """Let an input be read from memory; it is read anew at every run.

        Args:
            name: The input's.
            device: Where the memory is: the session's device. Memory elsewhere would be copied when
                it is bound, and not again.
            elements: What is in it.
            shape: Its dimensions.
            address: Where it begins.
        """
        self.io_binding.bind_input(name, device, 0, elements.onnx, list(shape), address)

    def bind_output(
        self, name: str, device: str, elements: ElementType, shape: Sequence[int], address: int
    ) -> None:
        """Let an output be written to memory; arguments as `bind_input`, on any device."""
        self._order.setdefault(name, len(self._order))
        self.io_binding.bind_output(name, device, 0, elements.onnx, list(shape), address)

    def bind_open_output(self, name: str) -> None:
        """Let an output whose size is not known be written to new memory of the host."""
        self._order.setdefault(name, len(self._order))
        self.io_binding.bind_output(name, "cpu")

    def read_open_output(self, name: str) -> npt.NDArray[Any]:
        """What the last run wrote where `bind_open_output` asked for it."""
        found: npt.NDArray[Any] = self.io_binding.get_outputs()[self._order[name]].numpy()
        return found
