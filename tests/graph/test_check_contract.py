import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from tests.wording import says

from echoatt_exporter.errors import ContractError, PropertyError
from echoatt_exporter.graph import Pipeline, rewrite_pipeline, run_pipeline
from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.branches import branches
from echoatt_exporter.graph.canonical.assign_roles import AssignRoles
from echoatt_exporter.graph.checks.check_contract import CheckContract
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.roles import Kind, Part, Use, role_of, set_role
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

PLAN = (0, 1, 1, 0)


@pytest.fixture
def shared(decoder):
    """A graph that keeps the contract, and its specification."""
    model = decoder().build()
    specification = decoder().specification(PLAN)
    RewireProbabilities(PLAN)(model)
    RemoveDeadBranches(PLAN)(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveUnusedNodesPass()(model)
    AssignRoles()(model)
    return model, specification


def value_named(values, name):
    return next(value for value in values if value.name == name)


def test_a_graph_that_keeps_the_contract_passes_and_is_not_touched(shared, ops):
    model, specification = shared
    before = ops(model)
    assert not CheckContract(specification)(model).modified
    assert ops(model) == before


def rename_input(model):
    value_named(model.graph.inputs, "past_lengths").name = "lengths"


def swap_outputs(model):
    model.graph.outputs[1], model.graph.outputs[2] = model.graph.outputs[2], model.graph.outputs[1]


def keep_key_cache(model):
    new = ir.Value(
        name="past_key_values.2.key",
        shape=ir.Shape(["batch", 2, "capacity", 4]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    model.graph.inputs.append(new)


def half_logits(model):
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def other_dimension(model):
    value = value_named(model.graph.inputs, "past_key_values.1.value")
    value.shape = ir.Shape(["batch", 2, 4, "length"])


def own_probabilities(model):
    wrong = find_attention(model.graph, 0).probabilities
    find_attention(model.graph, 2).context.replace_input_with(0, wrong)


def scatter_elsewhere(model):
    scatter = value_named(model.graph.outputs, "present.1.value").producer()
    copy = ir.node("Identity", [value_named(model.graph.inputs, "past_lengths")])
    copy.outputs[0].name = "copied"
    model.graph.insert_before(scatter, copy)
    scatter.replace_input_with(2, copy.outputs[0])


def scatter_axis(model):
    scatter = value_named(model.graph.outputs, "present.1.value").producer()
    scatter.attributes["axis"] = ir.AttrInt64("axis", 1)


def scatter_circular(model):
    scatter = value_named(model.graph.outputs, "present.1.key").producer()
    scatter.attributes["mode"] = ir.AttrString("mode", "circular")


def cache_into_another(model):
    scatter = value_named(model.graph.outputs, "present.3.value").producer()
    scatter.replace_input_with(0, value_named(model.graph.inputs, "past_key_values.2.value"))


def concatenated_cache(model):
    value_named(model.graph.outputs, "present.3.value").producer().op_type = "Concat"


def unread_weight(model):
    add_initializer(model, "stray")


def read_weight(model, role=()):
    """Adds a weight [5] that something reads."""
    value = add_initializer(model, "extra", size=5)
    node = ir.node("Add", [model.graph.outputs[0], value])
    node.outputs[0].name = "sum"
    model.graph.append(node)
    set_role(value, role)


def part(columns, *uses):
    return Part(frozenset(Use(*use) for use in uses), columns)


def unknown_weight(model):
    read_weight(model)


def unknown_columns(model):
    read_weight(model, [part(3, (Kind.VALUES, 0)), part(2)])


def follower_weight(model):
    read_weight(model, [part(5, (Kind.QUERIES, 2))])


def packed_follower_weight(model):
    queries, keys, values = ((kind, 3) for kind in (Kind.QUERIES, Kind.KEYS, Kind.VALUES))
    read_weight(model, [part(1, queries), part(2, keys), part(2, values)])


def follower_norm(model):
    read_weight(model, [part(5, (Kind.KEYS, 2), (Kind.KEYS, 3))])


def add_initializer(model, name, size=1):
    value = ir.Value(
        name=name,
        shape=ir.Shape([size]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.zeros(size, np.float32), name=name),
    )
    model.graph.register_initializer(value)
    return value


def old_opset(model):
    model.graph.opset_imports[""] = 23


def foreign_domain(model):
    next(iter(model.graph)).domain = "com.example"
    model.graph.opset_imports["com.example"] = 1


@pytest.mark.parametrize(
    ("break_it", "faults"),
    [
        (rename_input, ["inputs missing: past_lengths", "inputs not in the contract: lengths"]),
        (swap_outputs, ["outputs are in the order logits, present.0.value, present.0.key"]),
        (keep_key_cache, ["inputs not in the contract: past_key_values.2.key"]),
        (half_logits, ["output logits is FLOAT16, expected FLOAT"]),
        (
            other_dimension,
            ["past_key_values.1.value has shape [batch,2,4,length], expected [batch, 2, 4, cap"],
        ),
        (own_probabilities, ["layer 2 does not read the probabilities of layer 1"]),
        (scatter_elsewhere, ["present.1.value is not written at past_lengths"]),
        (scatter_axis, ["present.1.value is not written along its capacity"]),
        (scatter_circular, ["present.1.key is written in mode circular"]),
        (
            cache_into_another,
            [
                "present.3.value is not a TensorScatter into past_key_values.3.value",
                "past_key_values.2.value is read by 2 nodes",
            ],
        ),
        (concatenated_cache, ["present.3.value is not a TensorScatter"]),
        (unread_weight, ["nothing reads the initializer stray"]),
        (unknown_weight, ["extra is a weight of unknown role"]),
        (unknown_columns, ["extra is a weight with columns of unknown role"]),
        (follower_weight, ["extra holds the queries of the follower layer 2"]),
        (
            packed_follower_weight,
            [
                "extra holds the queries of the follower layer 3",
                "extra holds the keys of the follower layer 3",
            ],
        ),
        (follower_norm, ["holds the keys of the follower layer 2", "of the follower layer 3"]),
        (old_opset, ["operator set ai.onnx is 23, expected 24"]),
        (
            foreign_domain,
            ["operator set com.example is imported", "nodes of the domain com.example are used"],
        ),
    ],
)
def test_every_breach_is_named(shared, break_it, faults):
    model, specification = shared
    break_it(model)
    with pytest.raises(ContractError) as error:
        CheckContract(specification)(model)
    for fault in faults:
        assert says(str(error.value), fault)
    assert "\n" not in str(error.value)


def test_all_faults_are_reported_together(shared):
    model, specification = shared
    for break_it in (half_logits, unread_weight, old_opset, own_probabilities):
        break_it(model)
    with pytest.raises(ContractError) as error:
        CheckContract(specification)(model)
    for fault in ("FLOAT16", "stray", "is 23", "layer 2 does not read"):
        assert says(str(error.value), fault)


@pytest.mark.parametrize("layout", ["split", "heads"])
def test_packed_weights_of_followers_that_were_not_cut_are_faults(decoder, layout):
    tiny = decoder(layout=layout, **({"query_heads": 2} if layout == "heads" else {}))
    pipeline = rewrite_pipeline(tiny.specification(PLAN))
    steps = [step for step in pipeline.steps if step.name != "CutPackedWeights"]
    with pytest.raises(PropertyError, match="PackProjections requires that packed weights"):
        run_pipeline(tiny.build(), Pipeline(steps=steps))
    model = tiny.build()
    *before, check, _ = (step.transform for step in steps)
    for transform in before:
        transform.call(model)
    with pytest.raises(ContractError) as error:
        check.call(model)
    name = "l{}_qkv{} holds the {} of the follower layer {}"
    for layer in (2, 3):
        for kind in ("queries", "keys"):
            for weight in ("", "_bias"):
                assert name.format(layer, weight, kind, layer) in str(error.value)
    assert "l1_qkv" not in str(error.value)


def test_what_others_need_too_is_no_fault(shared):
    model, specification = shared
    read_weight(model, [part(5, (Kind.QUERIES, 2), (Kind.QUERIES, 1))])
    CheckContract(specification)(model)


def test_a_sources_weights_are_no_fault(shared):
    model, specification = shared
    name = "model.layers.1.self_attn.q_proj.weight"
    assert role_of(model.graph.initializers[name]) == (part(16, (Kind.QUERIES, 1)),)
    CheckContract(specification)(model)


@pytest.mark.parametrize(
    ("dtype", "element_type"),
    [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16), ("int4", ir.DataType.FLOAT)],
)
def test_cache_types_follow_the_dtype_and_logits_stay_float32(shared, decoder, dtype, element_type):
    model, specification = shared
    specification = decoder().specification(PLAN, dtype)
    if element_type != ir.DataType.FLOAT:
        with pytest.raises(ContractError, match=r"past_key_values\.0\.key is FLOAT, expected"):
            CheckContract(specification)(model)
    for value in (*model.graph.inputs[3:], *model.graph.outputs[1:]):
        value.type = ir.TensorType(element_type)
    CheckContract(specification)(model)


def test_followers_are_checked_through_branches(shared):
    model, specification = shared
    SplitDecode()(model)
    CheckContract(specification)(model)
    context = find_attention(model.graph, 2).context
    mine, other = (find_attention(model.graph, layer).probabilities for layer in (2, 0))
    for number, branch in enumerate(branches(context)):
        for node in branch:
            for index in [i for i, value in enumerate(node.inputs) if value is mine]:
                node.replace_input_with(index, other)
        fault = ("probabilities, or other ones", "layer 2 does not read the probabilities of")
        with pytest.raises(ContractError, match=fault[number]):
            CheckContract(specification)(model)
