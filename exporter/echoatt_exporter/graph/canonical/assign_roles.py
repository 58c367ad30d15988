"""Says of each weight what it is for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph.attention import find_attention, products_by
from echoatt_exporter.graph.canonical.walk_back import Claim, Walk, claims_of_product, columns_of
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.matching import NoMatch
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import Kind, Use, add_use, is_weight, set_role
from echoatt_runtime.contract import INPUT_IDS, LOGITS

# Their second input is what is looked up
_LOOKUPS = ("Gather", "GatherBlockQuantized")

logger = logging.getLogger(__name__)


class AssignRoles(GraphPass):
    """Gives weights their roles, by where they stand in the graph and not by their names.

    Works alike for a student's trace and for a bundle that is rewritten, whose weights may be
    packed and quantised. The pass gives

    1. queries, keys and values of a layer: the columns from which its scores and caches are
       computed, with the biases and norms on the way, in products that are packed or not, also head
       by head;
    2. output: the products that read a layer's context first;
    3. head: the product that computes the logits;
    4. feed-forward: every other product between context or embedding and the head, and norm: the
       vectors between them;
    5. embedding: the table in which the tokens are looked up;
    6. positions: what is combined with nothing that depends on what the tokens are.

    A weight that does several things has all these uses. What is none of these has no role, and
    CheckContract refuses it.
    """

    needs = frozenset({Property.NO_BRANCHES, Property.CONSTANTS_LIFTED, Property.NOTHING_UNUSED})
    gives = frozenset({Property.ROLES_ASSIGNED})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Assign roles; the weights themselves stay."""
        graph = model.graph
        for value in graph.initializers.values():
            set_role(value, ())
        hidden = _depending_on_tokens(graph)
        walk = Walk(graph, hidden)
        contexts = dict(_contexts(graph))
        logits = next((value for value in graph.outputs if value.name == LOGITS), None)
        products = _claim_behind(walk, logits, Use(Kind.HEAD))
        for layer in contexts:
            for kind, start in _starts(graph, layer):
                products += _claim_behind(walk, start, Use(kind, layer))
        _assign_stream(products, hidden, contexts)
        for value in graph.initializers.values():
            results = [result for use in value.uses() for result in use.node.outputs]
            if is_weight(value) and results and hidden.isdisjoint(results):
                add_use(value, Use(Kind.POSITIONS), _rows(value))
        return ir.passes.PassResult(model, modified=True)


def _depending_on_tokens(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on what the tokens are, and not on how many."""
    found = {value for value in graph.inputs if value.name == INPUT_IDS}
    for node in graph:
        if node.op_type != "Shape" and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _contexts(graph: ir.Graph) -> Iterator[tuple[int, ir.Node]]:
    """Each layer's product of probabilities and values, where it can be found."""
    names = {str(output.name) for output in graph.outputs}
    layer = 0
    while f"present.{layer}.value" in names:
        try:
            yield layer, find_attention(graph, layer).context
        except ContractError as error:
            logger.debug("the attention of layer %d has no roles: %s", layer, error)
        layer += 1


def _starts(graph: ir.Graph, layer: int) -> Iterator[tuple[Kind, ir.Value | None]]:
    """The values from which a layer's roles are found: what its caches take, and its queries."""
    presents = {str(output.name): output for output in graph.outputs}
    for kind, name in ((Kind.VALUES, "value"), (Kind.KEYS, "key")):
        present = presents.get(f"present.{layer}.{name}")
        scatter = None if present is None else present.producer()
        if scatter is None or present is None or scatter.op_type != "TensorScatter":
            continue
        yield kind, scatter.inputs[1]
        if kind is Kind.KEYS:
            for _, queries in products_by(present):
                yield Kind.QUERIES, queries


def _claim_behind(walk: Walk, start: ir.Value | None, use: Use) -> list[ir.Node]:
    """Give a use to all weights behind a value, up to the nearest products; give those."""
    if start is None:
        return []
    try:
        found = walk.back(start)
    except NoMatch as reason:
        logger.debug("%s of layer %s have no role: %s", use.kind.value, use.layer, reason)
        return []
    _add(found.claims, use)
    return found.products


def _add(claims: Iterable[Claim], use: Use) -> None:
    for claim in claims:
        add_use(claim.weight, use, claim.total, claim.columns)


def _assign_stream(
    products: Sequence[ir.Node], hidden: set[ir.Value], contexts: Mapping[int, ir.Node]
) -> None:
    """Give roles to all that stands in front of some products, up to the layers' contexts."""
    outputs = {
        product: Use(Kind.OUTPUT, layer)
        for layer, context in contexts.items()
        for product in _next_products(context)
    }
    stops = set(contexts.values())
    seen: set[ir.Node] = set()
    ahead = [node.inputs[0] for node in products]
    while ahead:
        value = ahead.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen or node in stops:
            continue
        seen.add(node)
        if (columns := columns_of(node)) is not None:
            _add(claims_of_product(node, columns), outputs.get(node, Use(Kind.FEED_FORWARD)))
            ahead.append(node.inputs[0])
            continue
        for weight in node.inputs:
            if weight is None or not weight.is_initializer() or not is_weight(weight):
                continue
            if node.op_type in _LOOKUPS and weight is not node.inputs[1]:
                add_use(weight, Use(Kind.EMBEDDING), _rows(weight, axis=0))
                continue
            product = _product_before(node)
            use = Use(Kind.NORM)
            if product is not None:
                use = outputs.get(product, Use(Kind.FEED_FORWARD))
            add_use(weight, use, _rows(weight))
        ahead += [item for item in node.inputs if item in hidden]


def _next_products(context: ir.Node) -> Iterator[ir.Node]:
    """The products that read a node's result with no other product between."""
    seen: set[ir.Node] = set()
    ahead = [context]
    while ahead:
        for node in {use.node for output in ahead.pop().outputs for use in output.uses()} - seen:
            seen.add(node)
            if columns_of(node) is not None:
                yield node
            else:
                ahead.append(node)


def _product_before(node: ir.Node) -> ir.Node | None:
    """The product whose result, or a part of it, a node adds something to."""
    if node.op_type != "Add":
        return None
    for value in node.inputs:
        before = None if value is None else value.producer()
        while before is not None and before.op_type in ("Split", "Slice", "Reshape"):
            value = before.inputs[0]
            before = None if value is None else value.producer()
        if before is not None and columns_of(before) is not None:
            return before
    return None


def _rows(value: ir.Value, axis: int = -1) -> int:
    """How many columns a weight has along an axis."""
    tensor = value.const_value
    assert tensor is not None  # noqa: S101 - it is a weight
    return int(tensor.shape.numpy()[axis])
