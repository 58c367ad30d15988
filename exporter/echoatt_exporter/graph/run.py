"""Runs passes and says what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.errors import ExportError
from echoatt_runtime.errors import EchoAttError, one_line

_FLOAT_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSize:
    """How large a graph is.

    Attributes:
        nodes: Operators, those in subgraphs too.
        parameters: Elements of floating-point initializers. Of a quantised weight its K·N elements
            count, and its scales and zero points do not.
        bytes: What all initializers take.
    """

    nodes: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: ir.Model) -> GraphSize:
        """Measure a graph, from shapes and types alone: no weight is read."""
        nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        quantized: dict[ir.Value | None, int] = {}
        for node in nodes:
            if node.op_type == "MatMulNBits":
                quantized |= dict.fromkeys(node.inputs[1:4], 0)
                elements = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
                quantized[node.inputs[1]] = elements
        parameters = size = 0
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            size += tensor.nbytes
            if value in quantized:
                parameters += quantized[value]
            elif tensor.dtype in _FLOAT_TYPES:
                parameters += tensor.size
        return cls(nodes=len(nodes), parameters=parameters, bytes=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStep:
    """A pass and why it runs where it does.

    Attributes:
        transform: The pass.
        why: One line, for people.
    """

    transform: ir.passes.PassBase
    why: str

    @property
    def name(self) -> str:
        """The pass's class name."""
        return type(self.transform).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: The pass's class name.
        why: Why it ran.
        modified: Whether it changed the graph.
        before: The graph's size before it.
        after: The graph's size after it.
    """

    name: str
    why: str
    modified: bool
    before: GraphSize
    after: GraphSize


def run_pipeline(
    model: ir.Model,
    steps: Sequence[PassStep],
    on_step: Callable[[PassStep], None] | None = None,
) -> list[PassReport]:
    """Run passes in order on one model, in place.

    Args:
        model: The graph to change.
        steps: Passes that work in place.
        on_step: Called before each pass, for a progress display.

    Returns:
        A report for each pass, in order.

    Raises:
        EchoAttError: A pass refused the graph; the error is the pass's own.
        ExportError: A pass failed for a reason that no pass foresees.
    """
    reports: list[PassReport] = []
    before = GraphSize.of(model)
    for step in steps:
        if on_step is not None:
            on_step(step)
        try:
            result = step.transform(model)
        except EchoAttError:
            raise
        except Exception as error:
            raise ExportError(
                f"the graph pass {step.name} failed: {one_line(error)}; please report it"
            ) from error
        after = GraphSize.of(model)
        reports.append(
            PassReport(
                name=step.name, why=step.why, modified=result.modified, before=before, after=after
            )
        )
        before = after
    return reports
