import onnx_ir as ir
import pytest

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph import GraphSize
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

PLAN = (0, 1, 1, 0)


def shared(decoder, plan=PLAN, **fields):
    model = decoder(**fields).build()
    RewireProbabilities(plan)(model)
    return model


def test_key_caches_projections_and_rotations_of_followers_go(decoder, evaluate, difference, ops):
    model = shared(decoder)
    feeds = decoder().feeds()
    expected, before, nodes = evaluate(model, feeds), GraphSize.of(model), ops(model)

    assert RemoveDeadBranches(PLAN)(model).modified

    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    for layer in range(4):
        follower = PLAN[layer] != layer
        assert (f"past_key_values.{layer}.key" in names) == (not follower)
        assert (f"present.{layer}.key" in names) == (not follower)
        assert f"past_key_values.{layer}.value" in names
        for projection in ("q", "k"):
            name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
            assert (name in model.graph.initializers) == (not follower)
    after = ops(model)
    # Two followers: scores product, query and key projections, one key scatter, two rotations each
    assert nodes["MatMul"] - after["MatMul"] == 2 * 3
    assert nodes["TensorScatter"] - after["TensorScatter"] == 2
    assert nodes["Neg"] - after["Neg"] == 2 * 2
    assert nodes["Softmax"] - after["Softmax"] == 2
    # Channels 16; 4 query and 2 key heads of 4
    assert before.parameters - GraphSize.of(model).parameters == 2 * (16 * 16 + 16 * 8)
    assert difference(expected, evaluate(model, feeds)) == 0


def test_it_does_nothing_twice(decoder):
    model = shared(decoder)
    RemoveDeadBranches(PLAN)(model)
    assert not RemoveDeadBranches(PLAN)(model).modified


def test_an_unshared_graph_keeps_everything(decoder, ops):
    plan = (0, 1, 2, 3)
    model = shared(decoder, plan)
    # It needs no clean-up either
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    before, size = ops(model), GraphSize.of(model)
    assert not RemoveDeadBranches(plan)(model).modified
    assert (ops(model), GraphSize.of(model)) == (before, size)


def test_capacity_that_was_asked_of_a_followers_key_cache_is_asked_of_its_value_cache(
    decoder, evaluate, difference
):
    model = shared(decoder, capacity_from="past_key_values.2.key")
    feeds = decoder().feeds()
    expected = evaluate(model, feeds)

    RemoveDeadBranches(PLAN)(model)

    assert "past_key_values.2.key" not in [value.name for value in model.graph.inputs]
    assert difference(expected, evaluate(model, feeds)) == 0


@pytest.mark.parametrize(
    ("before", "after"), [((0, 1), (0, 1)), ((0, 2), (0, 2)), ((2, 3), (3, 4)), ((3, 4), (2, 3))]
)
def test_sizes_are_asked_along_the_value_caches_axes(decoder, evaluate, before, after):
    model = shared(decoder)
    number = ask_for_sizes(model, *before)
    RemoveDeadBranches(PLAN)(model)
    attributes = [number.attributes[name].as_int() for name in ("start", "end")]
    assert tuple(attributes) == after
    feeds = decoder().feeds()
    sizes = dict(enumerate((2, 2, 12, 4)))
    assert evaluate(model, feeds)["sizes"].tolist() == [sizes[axis] for axis in range(*before)]


def test_sizes_that_the_value_cache_has_in_another_order_are_refused(decoder):
    model = shared(decoder)
    ask_for_sizes(model, 1, 3)
    with pytest.raises(ContractError, match=r"asks for axes \[1, 2\] of a follower's key cache"):
        RemoveDeadBranches(PLAN)(model)


def ask_for_sizes(model, start, end):
    key = next(value for value in model.graph.inputs if value.name == "past_key_values.2.key")
    number = ir.node("Shape", [key], {"start": start, "end": end})
    sizes = number.outputs[0]
    sizes.name, sizes.type = "sizes", ir.TensorType(ir.DataType.INT64)
    sizes.shape = ir.Shape([end - start])
    model.graph.insert_before(next(iter(model.graph)), number)
    model.graph.outputs.append(sizes)
    return number


def test_a_follower_that_was_not_rewired_is_refused_and_nothing_is_changed(decoder, ops):
    model = decoder().build()
    before = ops(model)
    with pytest.raises(ContractError, match="layer 2 does not read layer 1's"):
        RemoveDeadBranches(PLAN)(model)
    assert ops(model) == before
    assert len(model.graph.outputs) == 9


def test_a_key_cache_that_something_else_reads_is_refused_and_nothing_is_changed(decoder, ops):
    model = shared(decoder)
    graph = model.graph
    key = next(value for value in graph.inputs if value.name == "past_key_values.3.key")
    extra = ir.node("Identity", [key])
    extra.outputs[0].name = "extra"
    graph.append(extra)
    graph.outputs.append(extra.outputs[0])
    before = ops(model)
    with pytest.raises(ContractError, match=r"past_key_values\.3\.key belongs to a follower"):
        RemoveDeadBranches(PLAN)(model)
    assert ops(model) == before
    assert len(graph.outputs) == 10
