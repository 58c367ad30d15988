"""Takes everything out of a graph that is not meant for who runs it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.properties import Property


class ClearMetadata(GraphPass):
    """Removes metadata and texts from model, graphs, nodes and initializers.

    Traces of source code and its paths, the roles of weights, and the manifest of the bundle that
    a graph was read from do not belong in what is published.
    """

    needs = frozenset({Property.CONTRACT_KEPT})
    breaks = frozenset({Property.ROLES_ASSIGNED})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove them."""
        modified = ClearMetadataAndDocStringPass()(model).modified
        weights = [v for graph in model.graphs() for v in graph.initializers.values()]
        for properties in (model.metadata_props, *(value.metadata_props for value in weights)):
            modified = modified or bool(properties)
            properties.clear()
        return ir.passes.PassResult(model, modified=modified)
