"""Runs passes over a graph: refuses a wrong order, and says what each did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from echoatt_exporter.errors import ExportError, PropertyError
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.size import GraphSize
from echoatt_runtime.errors import EchoAttError, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStep:
    """A pass and why it runs where it does.

    Attributes:
        transform: The pass.
        why: One line, for people; what the pass needs and gives is what orders it.
    """

    transform: GraphPass
    why: str

    @property
    def name(self) -> str:
        """What the pass is called."""
        return self.transform.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Passes in order.

    Attributes:
        steps: The passes.
        given: What the graph has before the first of them.
    """

    steps: Sequence[PassStep]
    given: frozenset[Property] = frozenset()

    def check_order(self) -> None:
        """Check that each pass has what it needs, by what passes say of themselves.

        Raises:
            PropertyError: A pass comes before what ensures a property that it needs, or after what
                breaks it.
        """
        have = set(self.given)
        for step in self.steps:
            transform = step.transform
            for wanted in sorted(transform.needs - have, key=lambda one: one.name):
                raise PropertyError(
                    f"the graph pass {step.name} requires that {wanted.value} ({wanted.name}), and "
                    "no pass before it ensures that for it; put the passes in another order"
                )
            have = (have - transform.breaks) | transform.gives


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: What the pass is called.
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
    pipeline: Pipeline,
    on_step: Callable[[PassStep], None] | None = None,
) -> list[PassReport]:
    """Run passes in order on one model, in place.

    Args:
        model: The graph to change.
        pipeline: Passes that work in place.
        on_step: Called before each pass, for a progress display; it may change the graph.

    Returns:
        A report for each pass, in order.

    Raises:
        EchoAttError: A pass refused the graph; the error is the pass's own.
        PropertyError: The order of the passes is wrong, and nothing ran; or the graph can be seen
            to lack what a pass requires or should ensure.
        ExportError: A pass failed for a reason that no pass foresees.
    """
    pipeline.check_order()
    reports: list[PassReport] = []
    for step in pipeline.steps:
        if on_step is not None:
            on_step(step)
        before = GraphSize.of(model)
        try:
            result = step.transform(model)
        except EchoAttError:
            raise
        except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
            if isinstance(error.__cause__, EchoAttError):
                raise error.__cause__ from error
            raise PropertyError(f"the graph pass {one_line(error)}; please report it") from error
        except Exception as error:
            raise ExportError(
                f"the graph pass {step.name} failed: {one_line(error)}; please report it"
            ) from error
        reports.append(
            PassReport(
                name=step.name,
                why=step.why,
                modified=result.modified,
                before=before,
                after=GraphSize.of(model),
            )
        )
    return reports
