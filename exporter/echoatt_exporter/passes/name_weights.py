"""Gives weights that the exporter transposed the names of their modules back."""

from __future__ import annotations

import ast

import onnx_ir as ir

from echoatt_exporter.passes._matching import RewritePass, given, graph_of, need
from echoatt_exporter.passes._weights import weight_of

# PyTorch's exporter writes the modules around a node here, as a Python list: the outermost first,
# and the node's own name last.
_SCOPES = "pkg.torch.onnx.name_scopes"


class NameWeights(RewritePass):
    """Names the constant operand of a matrix product after the module that it belongs to.

    The exporter folds the transposition of a linear layer's weight, and calls the result `val_79`.
    With names, reports can be read and CheckContract can tell whose weight is left over. The pass
    acts on

    1. a MatMul's or Gemm's constant second operand whose name belongs to no module, where the node
       says in which module it is: it becomes `{module}.weight.transposed`.

    A weight that has its own name, or whose new name is taken, keeps its old one.
    """

    roots = frozenset({"MatMul", "Gemm"})

    def rewrite(self, node: ir.Node) -> None:
        """Name one product's weight."""
        graph = graph_of(node)
        weight = given(node.inputs[1])
        weight_of(weight, rank=2)
        need("." not in str(weight.name), f"{weight.name} has a name of its own")
        need(_SCOPES in node.metadata_props, "the node does not say where it comes from")
        scopes = ast.literal_eval(node.metadata_props[_SCOPES])
        need(isinstance(scopes, list) and len(scopes) > 1 and bool(scopes[-2]), "it has no module")
        name = f"{scopes[-2]}.weight.transposed"
        need(name not in graph.initializers, f"{name} is taken")
        weight.name = name
