"""The last pass: does the graph keep the contract that the runtime relies on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.roles import Kind, Role, Use, is_weight, role_of
from echoatt_runtime.contract import (
    CHOICES,
    INPUT_IDS,
    LOGIT_SUMS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    Specification,
)

OPSETS = {"": 24, "com.microsoft": 1}

# What a follower takes from its source
_DROPPED = (Kind.QUERIES, Kind.KEYS)


class CheckContract(GraphPass):
    """Checks a finished graph against its specification and changes nothing.

    It checks

    1. inputs and outputs: names, order, element types, shapes with the contract's dimension names;
    2. caches: each is read by one TensorScatter only, which writes its present output at
       `past_lengths`;
    3. followers: they have no key cache, and read the very value that their source computes;
    4. initializers: none that nothing reads, no weight of whose columns some have no known role,
       none with columns that serve a follower's queries or keys alone;
    5. operator sets: ai.onnx 24 and com.microsoft 1, no other, and no node of another domain.

    All faults are collected before one error is raised. What only the written file can show is
    `check_file`'s part.
    """

    needs = frozenset({Property.ROLES_ASSIGNED, Property.OPSETS_USED})
    gives = frozenset({Property.CONTRACT_KEPT})
    breaks = frozenset()

    def __init__(self, specification: Specification) -> None:
        """Take the bundle's specification."""
        self._specification = specification

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check the graph.

        Raises:
            ContractError: It breaks the contract; the message lists every fault.
        """
        specification = self._specification
        faults = [
            *_interface_faults(model.graph, specification),
            *_cache_faults(model.graph, specification),
            *_follower_faults(model.graph, specification),
            *_initializer_faults(model.graph, specification),
            *_opset_faults(model),
        ]
        if faults:
            raise ContractError(
                f"the graph breaks the contract: {'; '.join(faults)}; export the model again, and "
                "report this if it happens again"
            )
        return ir.passes.PassResult(model, modified=False)


def _interface_faults(graph: ir.Graph, specification: Specification) -> Iterator[str]:
    caches = {
        cache.name: (ir.DataType(cache.elements.onnx), cache.axes) for cache in specification.caches
    }
    inputs = {
        INPUT_IDS: (ir.DataType.INT64, ("batch", "seq")),
        PAST_LENGTHS: (ir.DataType.INT64, ("batch",)),
        LOGITS_INDICES: (ir.DataType.INT64, ("batch", "n")),
        **{f"past_key_values.{name}": value for name, value in caches.items()},
    }
    outputs = {
        LOGITS: (ir.DataType.FLOAT, ("batch", "n", specification.vocab_size)),
        CHOICES: (ir.DataType.INT64, ("batch", "n")),
        LOGIT_SUMS: (ir.DataType.FLOAT, ("batch", "n")),
        **{f"present.{name}": value for name, value in caches.items()},
    }
    for kind, values, expected, order in (
        ("input", graph.inputs, inputs, specification.input_names),
        (
            "output",
            graph.outputs,
            outputs,
            (*specification.output_names, *specification.choice_names),
        ),
    ):
        names = [str(value.name) for value in values]
        yield from _name_faults(kind, names, order)
        for value in values:
            if value.name in expected:
                yield from _type_faults(kind, value, *expected[str(value.name)])


def _name_faults(kind: str, names: Sequence[str], order: Sequence[str]) -> Iterator[str]:
    missing = [name for name in order if name not in names]
    surplus = [name for name in names if name not in order]
    double = sorted({name for name in names if names.count(name) > 1})
    for what, which in (("missing", missing), ("not in the contract", surplus), ("twice", double)):
        if which:
            yield f"{kind}s {what}: {', '.join(which)}"
    if not (missing or surplus or double) and list(names) != list(order):
        yield f"{kind}s are in the order {', '.join(names)}, expected {', '.join(order)}"


def _type_faults(
    kind: str, value: ir.Value, dtype: ir.DataType, dims: tuple[str | int, ...]
) -> Iterator[str]:
    if value.dtype != dtype:
        yield f"{kind} {value.name} is {value.dtype}, expected {dtype}"
    shape = None if value.shape is None else [str(dim) for dim in value.shape]
    if shape != [str(dim) for dim in dims]:
        expected = ", ".join(str(dim) for dim in dims)
        yield f"{kind} {value.name} has shape {value.shape}, expected [{expected}]"


def _cache_faults(graph: ir.Graph, specification: Specification) -> Iterator[str]:
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    for cache in specification.caches:
        past_name, present_name = cache.past_name, cache.present_name
        past, present = inputs.get(past_name), outputs.get(present_name)
        if past is None or present is None:
            continue
        scatter = present.producer()
        if scatter is None or scatter.op_type != "TensorScatter" or scatter.inputs[0] is not past:
            yield f"{present_name} is not a TensorScatter into {past_name}"
            continue
        indices = scatter.inputs[2] if len(scatter.inputs) > 2 else None
        if indices is None or indices is not inputs.get(PAST_LENGTHS):
            yield f"{present_name} is not written at past_lengths"
        axis = cache.capacity_axis
        if scatter.attributes.get_int("axis", -2) not in (axis, axis - 4):
            yield f"{present_name} is not written along its capacity"
        if scatter.attributes.get_string("mode", "linear") != "linear":
            yield f"{present_name} is written in mode {scatter.attributes.get_string('mode')}"
        # A Shape reads no elements; any other reader would keep the update from being in place
        readers = [use.node for use in past.uses() if use.node.op_type != "Shape"]
        if readers != [scatter]:
            yield f"{past_name} is read by {len(readers)} nodes, expected its TensorScatter alone"


def _follower_faults(graph: ir.Graph, specification: Specification) -> Iterator[str]:
    for layer, source in enumerate(specification.plan.sources):
        try:
            attention = find_attention(graph, layer)
            expected = find_attention(graph, source).probabilities
        except ContractError as error:
            yield str(error).partition(";")[0]
            continue
        if attention.probabilities is not expected:
            yield f"layer {layer} does not read the probabilities of layer {source}"


def _initializer_faults(graph: ir.Graph, specification: Specification) -> Iterator[str]:
    for name, value in graph.initializers.items():
        if not value.uses() and not value.is_graph_output():
            yield f"nothing reads the initializer {name}"
        elif is_weight(value):
            yield from _role_faults(name, role_of(value), specification)


def _role_faults(name: str, role: Role, specification: Specification) -> Iterator[str]:
    """What is wrong with a weight's role, each fault once however many heads have it."""
    if not role or not all(part.uses for part in role):
        yield f"{name} is a weight {'with columns ' if role else ''}of unknown role"
    dropped: dict[tuple[str, int | None], None] = {}
    for part in role:
        if part.uses and all(_is_dropped(use, specification) for use in part.uses):
            dropped |= dict.fromkeys((use.kind.value, use.layer) for use in part.uses)
    for kind, layer in dropped:
        yield f"{name} holds the {kind} of the follower layer {layer}"


def _is_dropped(use: Use, specification: Specification) -> bool:
    if use.kind not in _DROPPED or use.layer is None:
        return False
    return use.layer < specification.num_layers and specification.plan.is_follower(use.layer)


def _opset_faults(model: ir.Model) -> Iterator[str]:
    for domain, version in model.graph.opset_imports.items():
        expected = OPSETS.get(domain)
        if expected is None:
            yield f"operator set {domain} is imported"
        elif version != expected:
            yield f"operator set {domain or 'ai.onnx'} is {version}, expected {expected}"
    if "" not in model.graph.opset_imports:
        yield "operator set ai.onnx is not imported"
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in sorted(used - set(OPSETS)):
        yield f"nodes of the domain {domain} are used"
    if model.functions:
        yield f"{len(model.functions)} functions are left, expected none"
