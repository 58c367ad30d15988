"""What every pass of ours is: an `onnx_ir` pass that says what it requires and ensures."""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterable

import onnx_ir as ir

from echoatt_exporter.graph.matching import NoMatch
from echoatt_exporter.graph.properties import Property, fault_of


class GraphPass(ir.passes.InPlacePass):
    """A pass that works in place, with the properties that order it.

    Attributes:
        needs: What the graph must have before the pass.
        gives: What it has after the pass.
        breaks: What it may not have any more. Whatever changes a graph may leave something unused,
            and breaks the contract until that is checked again.
    """

    needs: frozenset[Property] = frozenset()
    gives: frozenset[Property] = frozenset()
    breaks: frozenset[Property] = frozenset({Property.CONTRACT_KEPT, Property.NOTHING_UNUSED})

    @property
    def name(self) -> str:
        """What the pass is called in reports."""
        return type(self).__name__

    def requires(self, model: ir.Model) -> None:
        """Check what the pass needs.

        Raises:
            PreconditionError: The graph can be seen to lack it.
        """
        if fault := self._fault(model, self.needs, "requires"):
            raise ir.passes.PreconditionError(fault)

    def ensures(self, model: ir.Model) -> None:
        """Check what the pass gives.

        Raises:
            PostconditionError: The graph can be seen to lack it.
        """
        if fault := self._fault(model, self.gives, "should ensure"):
            raise ir.passes.PostconditionError(fault)

    def _fault(self, model: ir.Model, wanted: Iterable[Property], verb: str) -> str | None:
        for one in sorted(wanted, key=lambda one: one.name):
            if (fault := fault_of(model, one)) is not None:
                return f"{self.name} {verb} that {one.value}, and {fault}"
        return None


class CommonPass(GraphPass):
    """A pass of `onnx_ir`, with what it requires and ensures."""

    def __init__(
        self,
        transform: ir.passes.PassBase,
        *,
        needs: Iterable[Property] = (),
        gives: Iterable[Property] = (),
    ) -> None:
        """Take the pass and its properties."""
        self._transform = transform
        self.needs, self.gives = frozenset(needs), frozenset(gives)

    @property
    def name(self) -> str:
        """The class name of `onnx_ir`'s pass."""
        return type(self._transform).__name__

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        return self._transform(model)


class RewritePass(GraphPass):
    """A pass that tries one rule at every node of some operator types.

    Subclasses name the operators in `roots`, as (domain, type), and implement `rewrite`, which
    either changes the graph or raises `NoMatch` before it has changed anything.
    """

    roots: frozenset[tuple[str, str]]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Try the rule at each root, in graph order."""
        self.prepare()
        logger = logging.getLogger(type(self).__module__)
        applied = 0
        for node in tuple(model.graph):
            if node.graph is None or (node.domain, node.op_type) not in self.roots:
                continue
            try:
                self.rewrite(node)
            except NoMatch as reason:
                name = node.name or node.outputs[0].name
                logger.debug("%s left %s alone: %s", type(self).__name__, name, reason)
            else:
                applied += 1
        logger.debug("%s applied %d times", type(self).__name__, applied)
        return ir.passes.PassResult(model, modified=applied > 0)

    def prepare(self) -> None:
        """Called once before the nodes are visited."""

    @abc.abstractmethod
    def rewrite(self, node: ir.Node) -> None:
        """Apply the rule at `node`.

        Raises:
            NoMatch: The rule does not apply; the graph is as it was.
        """
