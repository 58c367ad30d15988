"""What a pass may require of a graph, and ensures: named properties, which are checked.

The order of passes follows from them: `check_order` refuses a pass that comes before what it
requires. Where a graph shows cheaply whether it has a property, `fault_of` looks.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.branches import one_token_condition
from echoatt_exporter.graph.matching import NoMatch
from echoatt_exporter.graph.roles import is_weight, role_of
from echoatt_exporter.graph.sharing.read_columns import PRODUCTS, find_read_columns

# Constants of shapes and axes are this small; norms of real models are not, and stay apart.
CONSTANT_SIZE: Final = 16

_FLOAT_WEIGHTS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class Property(enum.Enum):
    """A property of a graph; the value says it in words."""

    NO_BRANCHES = "no branch is for one token"
    NO_IDENTITIES = "no Identity stands between two nodes"
    CONSTANTS_LIFTED = "constants are initializers"
    CONSTANTS_MERGED = "equal small constants are one"
    COMPUTED_ONCE = "equal computations are one"
    NORMS_FUSED = "norms are single operators"
    ROTARY_FUSED = "rotations are single operators"
    ROLES_ASSIGNED = "weights carry their roles"
    PLAN_APPLIED = "followers read their sources' probabilities"
    NO_DEAD_KEYS = "each key cache serves its own layer's attention"
    COLUMNS_CUT = "packed weights have only columns that something reads"
    RESIDUALS_FUSED = "residual additions are part of the norms behind them"
    PACKED = "projections of one input are one product"
    QUANTISED = "no product reads a float weight"
    NOTHING_UNUSED = "every node and initializer is read"
    OPSETS_USED = "only operator sets that are used are imported"
    CONTRACT_KEPT = "the graph keeps the contract"


def fault_of(model: ir.Model, wanted: Property) -> str | None:
    """What shows that a graph lacks a property; None if nothing does."""
    find = _FAULTS.get(wanted)
    return None if find is None else find(model.graph)


def _branch(graph: ir.Graph) -> str | None:
    for node in graph:
        if node.op_type != "If":
            continue
        try:
            one_token_condition(node)
        except NoMatch:
            continue
        return f"{node.outputs[0].name} has a branch for one"
    return None


def _identity(graph: ir.Graph) -> str | None:
    for node in graph:
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            return f"{node.outputs[0].name} is an Identity"
    return None


def _constant_node(graph: ir.Graph) -> str | None:
    for node in graph:
        if node.op_type == "Constant":
            return f"{node.outputs[0].name} is a Constant"
    return None


def _equal_constants(graph: ir.Graph) -> str | None:
    first: dict[tuple[object, ...], str | None] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.size > CONSTANT_SIZE or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        other = first.setdefault(key, value.name)
        if other != value.name:
            return f"{other} and {value.name} are equal"
    return None


def _no_roles(graph: ir.Graph) -> str | None:
    weights = [value for value in graph.initializers.values() if is_weight(value)]
    if weights and not any(role_of(weight) for weight in weights):
        return f"none of {len(weights)} weights has a role"
    return None


def _dead_key(graph: ir.Graph) -> str | None:
    for output in graph.outputs:
        prefix, _, kind = str(output.name).rpartition(".")
        if kind != "key":
            continue
        layer = int(prefix.rpartition(".")[2])
        if not _leads_to(output, find_attention(graph, layer).context):
            return f"{output.name} has no part in layer {layer}'s attention"
    return None


def _leads_to(value: ir.Value, node: ir.Node) -> bool:
    """Whether a node depends on a value; the way is short where it does."""
    seen: set[ir.Node] = set()
    ahead = [use.node for use in value.uses()]
    while ahead:
        if node in ahead:
            return True
        seen.update(ahead)
        nodes = [use.node for one in ahead for output in one.outputs for use in output.uses()]
        ahead = [one for one in dict.fromkeys(nodes) if one not in seen]
    return False


def _unread_columns(graph: ir.Graph) -> str | None:
    for node in graph:
        if (node.domain, node.op_type) not in PRODUCTS:
            continue
        try:
            find_read_columns(node)
        except NoMatch:
            continue
        return f"{node.outputs[0].name} has columns that nothing reads"
    return None


def _same_input(graph: ir.Graph) -> str | None:
    products: Counter[tuple[ir.Value | None, ir.DataType | None]] = Counter()
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
        if weight is None or not _is_matrix(weight) or len(weight.uses()) > 1:
            continue
        products[node.inputs[0], weight.dtype] += 1
    for (value, _), count in products.items():
        if count > 1 and value is not None:
            return f"{count} products read {value.name}"
    return None


def _float_product(graph: ir.Graph) -> str | None:
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
        if weight is not None and _is_matrix(weight) and weight.dtype in _FLOAT_WEIGHTS:
            return f"a product reads {weight.name}, which is {weight.dtype}"
    return None


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and len(tensor.shape) == 2


_FAULTS: Final[Mapping[Property, Callable[[ir.Graph], str | None]]] = {
    Property.NO_BRANCHES: _branch,
    Property.NO_IDENTITIES: _identity,
    Property.CONSTANTS_LIFTED: _constant_node,
    Property.CONSTANTS_MERGED: _equal_constants,
    Property.ROLES_ASSIGNED: _no_roles,
    Property.NO_DEAD_KEYS: _dead_key,
    Property.COLUMNS_CUT: _unread_columns,
    Property.PACKED: _same_input,
    Property.QUANTISED: _float_product,
}
