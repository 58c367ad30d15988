import itertools

import numpy as np
import onnx_ir as ir
import pytest
from tests.quantisation import to_nearest

from echoatt_exporter.errors import ExportError, PropertyError
from echoatt_exporter.graph import (
    PassStep,
    Pipeline,
    export_pipeline,
    rewrite_pipeline,
    run_pipeline,
)
from echoatt_exporter.graph.graph_pass import CommonPass, GraphPass
from echoatt_exporter.graph.lowering import by_name
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.graph.properties import Property, fault_of
from echoatt_exporter.graph.roles import Kind, Part, Use, set_role
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

PLAN = (0, 1, 1, 0)


def names(pipeline):
    return [step.name for step in pipeline.steps]


def moved(pipeline, name, before):
    """The pipeline with one pass in front of another."""
    steps = list(pipeline.steps)
    step = steps.pop(names(pipeline).index(name))
    steps.insert([one.name for one in steps].index(before), step)
    return Pipeline(steps=steps, given=pipeline.given)


@pytest.mark.parametrize(
    ("name", "before", "late", "lacking"),
    [
        ("LiftConstantsToInitializersPass", "FuseRmsNorm", "Deduplicate", "CONSTANTS_LIFTED"),
        ("AssignRoles", "ClearMetadata", "QuantizeTable", "ROLES_ASSIGNED"),
        ("RemoveDeadBranches", "RewireProbabilities", "RemoveDead", "PLAN_APPLIED"),
        ("CutPackedWeights", "RemoveDeadBranches", "CutPackedWeights", "NO_DEAD_KEYS"),
        ("PackProjections", "RewireProbabilities", "PackProjections", "COLUMNS_CUT"),
        ("PackProjections", "FuseRotary", "PackProjections", "COLUMNS_CUT"),
        ("FuseRotary", "GatherEarly", "PackProjections", "ROTARY_FUSED"),
        ("FuseSkipRmsNorm", "FuseRmsNorm", "FuseSkipRmsNorm", "NORMS_FUSED"),
        ("RotateTogether", "PackProjections", "RotateTogether", "PACKED"),
        ("QuantizeWeights", "PackProjections", "QuantizeWeights", "PACKED"),
        ("SplitDecode", "GatherEarly", "GatherEarly", "NO_BRANCHES"),
        ("RemoveUnusedOpsetsPass", "RemoveUnusedNodesPass", "RemoveUnusedOps", "NOTHING_UNUSED"),
        ("ClearMetadata", "CheckContract", "ClearMetadata", "CONTRACT_KEPT"),
        ("CheckContract", "GatherEarly", "CheckContract", "OPSETS_USED"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_runs(decoder, name, before, late, lacking):
    tiny = decoder(hidden=32)
    pipeline = moved(rewrite_pipeline(tiny.specification(PLAN, "int4")), name, before)
    ran = []
    with pytest.raises(PropertyError, match=rf"{late}\w* requires that .*\({lacking}\)"):
        run_pipeline(tiny.build(), pipeline, on_step=ran.append)
    assert ran == []


def test_sharing_may_not_be_left_out_where_it_is_not_done(decoder):
    pipeline = export_pipeline(decoder().specification())
    assert not {"RewireProbabilities", "RemoveDeadBranches", "CutPackedWeights"} & set(
        names(pipeline)
    )
    with pytest.raises(PropertyError, match=r"\(COLUMNS_CUT\)"):
        Pipeline(steps=pipeline.steps).check_order()


def test_what_changes_a_graph_after_the_check_must_be_checked_again(decoder):
    pipeline = export_pipeline(decoder().specification(device="cuda"))
    with pytest.raises(PropertyError, match=r"ClearMetadata requires .*\(CONTRACT_KEPT\)"):
        moved(pipeline, "ViewOneToken", "ClearMetadata").check_order()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_every_requirement_is_that_of_some_order(decoder, dtype, device):
    """No pass may be dropped whose property a later one needs."""
    pipeline = rewrite_pipeline(decoder().specification(PLAN, dtype, device))
    needed = set().union(*(step.transform.needs for step in pipeline.steps))
    for step in pipeline.steps:
        others = [one for one in pipeline.steps if one is not step]
        ensured = set().union(*(one.transform.gives for one in others))
        if (step.transform.gives & needed) - ensured:
            with pytest.raises(PropertyError):
                Pipeline(steps=others).check_order()


def rewire(model):
    RewireProbabilities(PLAN)(model)


def lift_twice(model):
    for name in ("zero", "zero_again"):
        model.graph.initializers.pop(name, None)
        value = ir.Value(name=name, const_value=ir.tensor(np.array([0], np.int64), name=name))
        model.graph.register_initializer(value)


def add_identity(model):
    node = next(iter(model.graph))
    identity = ir.node("Identity", [node.outputs[0]])
    identity.outputs[0].name = "same"
    model.graph.insert_after(node, identity)


def drop_roles(model):
    for value in model.graph.initializers.values():
        set_role(value, ())


def unpack(model):
    node = next(node for node in model.graph if node.op_type == "MatMul")
    weight = ir.Value(name="other", const_value=ir.tensor(np.zeros((16, 2), np.float32)))
    weight.dtype = ir.DataType.FLOAT
    model.graph.register_initializer(weight)
    model.graph.insert_after(node, ir.node("MatMul", [node.inputs[0], weight]))


LACKING = {
    Property.NO_BRANCHES: (SplitDecode().call, "has a branch for one"),
    Property.NO_IDENTITIES: (add_identity, "same is an Identity"),
    Property.CONSTANTS_LIFTED: (None, "is a Constant"),
    Property.CONSTANTS_MERGED: (lift_twice, "zero and zero_again are equal"),
    Property.ROLES_ASSIGNED: (drop_roles, "none of .* weights has a role"),
    Property.NO_DEAD_KEYS: (rewire, r"present\.2\.key has no part in layer 2's attention"),
    Property.COLUMNS_CUT: (None, "has columns that nothing reads"),
    Property.PACKED: (unpack, "2 products read"),
    Property.QUANTISED: (unpack, "a product reads .*, which is FLOAT"),
}


def lacking(decoder, model_of, wanted):
    """A graph that lacks one property."""
    if wanted is Property.CONSTANTS_LIFTED:
        return decoder().build()
    if wanted is Property.COLUMNS_CUT:
        return model_of(
            "g (float[b,s,4] x, float[4,6] w) => (float[b,s,2] v)\n"
            "{ y = MatMul(x, w)\n q, k, v = Split<axis=-1, num_outputs=3>(y) }",
            {"w": np.ones((4, 6), np.float32)},
        )
    tiny = decoder()
    model = tiny.build()
    steps = export_pipeline(tiny.specification()).steps
    end = "ShareTiedTable" if wanted is Property.PACKED else "FuseSkipRmsNorm"
    for step in itertools.takewhile(lambda step: step.name != end, steps):
        step.transform(model)
    LACKING[wanted][0](model)
    return model


@pytest.mark.parametrize("wanted", list(LACKING), ids=lambda wanted: wanted.name)
def test_each_predicate_fails_where_the_property_is_lacking(decoder, model_of, wanted):
    model = lacking(decoder, model_of, wanted)

    class Needing(GraphPass):
        needs = frozenset({wanted})

        def call(self, model):
            raise AssertionError("it ran")

    giving = CommonPass(QuantizeWeights(to_nearest(4)), gives={wanted})
    giving.call = lambda model: ir.passes.PassResult(model, modified=False)
    reason = LACKING[wanted][1]
    step = PassStep(transform=Needing(), why="a test")
    with pytest.raises(PropertyError, match=f"Needing requires that .*{reason}") as error:
        run_pipeline(model, Pipeline(steps=[step], given=frozenset({wanted})))
    assert "\n" not in str(error.value)
    step = PassStep(transform=giving, why="a test")
    with pytest.raises(PropertyError, match=f"QuantizeWeights should ensure that .*{reason}"):
        run_pipeline(model, Pipeline(steps=[step]))


def test_each_predicate_holds_where_its_pass_has_run(decoder):
    tiny = decoder(layout="split", hidden=32)
    model = tiny.build()
    found = set()
    for step in rewrite_pipeline(tiny.specification(PLAN, "int4")).steps:
        step.transform(model)
        found |= step.transform.gives
        assert not any(fault_of(model, one) for one in step.transform.gives)
    assert found >= set(LACKING)


def test_lowerings_are_the_folders(decoder, monkeypatch):
    assert by_name.lowerings() == ["cpu", "cuda"]
    cpu, cuda = (
        names(export_pipeline(decoder().specification(device=name))) for name in ("cpu", "cuda")
    )
    assert set(cpu) - set(cuda) == {"RotateTogether", "SplitDecode"}
    assert set(cuda) - set(cpu) == {"ChooseTokens", "ViewOneToken"}
    assert [name for name in cpu if name in cuda] == [name for name in cuda if name in cpu]
    monkeypatch.setattr(by_name, "lowerings", lambda: ["cpu"])
    with pytest.raises(ExportError, match="there is no lowering 'cuda'; choose one of cpu"):
        by_name.lowering_steps(decoder().specification(device="cuda"))


def test_a_role_is_no_property_of_one_weight_alone():
    value = ir.Value(name="w", const_value=ir.tensor(np.ones(3, np.float32)))
    set_role(value, [Part(frozenset({Use(Kind.NORM)}), 3)])
    graph = ir.Graph([], [], nodes=[], initializers=[value])
    assert fault_of(ir.Model(graph, ir_version=10), Property.ROLES_ASSIGNED) is None
