import onnx_ir as ir
import pytest
from tests.wording import whole

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities
from echoatt_runtime.errors import PlanError

PLAN = (0, 1, 1, 0)


def first_operand(model, layer):
    return find_attention(model.graph, layer).probabilities


def test_follower_reads_its_sources_probabilities(decoder, evaluate, difference):
    model = decoder().build()
    own = [first_operand(model, layer) for layer in range(4)]

    assert RewireProbabilities(PLAN)(model).modified

    assert [first_operand(model, layer) for layer in range(4)] == [own[source] for source in PLAN]
    expected = decoder(sources=PLAN, followers=(2, 3)).build()
    # The weights of the two graphs differ, for a follower has fewer: only the topology is compared
    assert first_operand(expected, 2) is first_operand(expected, 1)


def test_numbers_are_those_of_a_graph_that_was_shared_from_the_start(decoder, evaluate, difference):
    rewired = decoder().build()
    RewireProbabilities(PLAN)(rewired)
    shared = decoder(sources=PLAN, followers=(2, 3)).build()
    for name, value in shared.graph.initializers.items():
        value.const_value = rewired.graph.initializers[name].const_value
    feeds = decoder().feeds()

    result = evaluate(rewired, feeds)
    assert difference(result, evaluate(shared, feeds)) < 1e-6
    unshared = evaluate(decoder().build(), feeds)
    assert abs(result["logits"] - unshared["logits"]).max() > 0.05


def test_a_follower_that_reads_its_sources_already_is_left_alone(decoder):
    model = decoder(sources=PLAN, followers=(2, 3)).build()
    assert not RewireProbabilities(PLAN)(model).modified
    assert not RewireProbabilities((0, 1, 2, 3))(decoder().build()).modified


def test_other_head_counts_are_refused_and_nothing_is_changed(decoder):
    model = decoder(kv_heads_of={2: 1}).build()
    own = [first_operand(model, layer) for layer in range(4)]
    with pytest.raises(PlanError, match="layer 2 cannot use layer 1's probabilities"):
        RewireProbabilities(PLAN)(model)
    assert [first_operand(model, layer) for layer in range(4)] == own


def test_symbolic_sizes_that_read_differently_are_refused(decoder):
    model = decoder().build()
    first_operand(model, 1).shape = ir.Shape(["batch", 2, "2*seq", "capacity"])
    first_operand(model, 2).shape = ir.Shape(["batch", 2, "4*seq", "capacity"])
    with pytest.raises(PlanError, match=r"layer 2 .*2\*seq.*4\*seq"):
        RewireProbabilities(PLAN)(model)


def test_unknown_sizes_do_not_stand_in_the_way(decoder):
    model = decoder().build()
    first_operand(model, 2).shape = None
    assert RewireProbabilities(PLAN)(model).modified


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ((0, 1, 1), "3 layers and the graph 4"),
        ((0, 1, 3, 3), "layer 2 uses layer 3, which is not earlier"),
        ((0, 0, 1, 3), "layer 2 uses layer 1, which is itself a follower"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(decoder, sources, fault):
    with pytest.raises(PlanError, match=whole(fault)):
        RewireProbabilities(sources)(decoder().build())


def test_a_layer_without_a_context_product_is_named(decoder):
    model = decoder().build()
    find_attention(model.graph, 3).context.op_type = "Mul"
    with pytest.raises(ContractError, match="layer 3: 0 MatMul nodes"):
        RewireProbabilities(PLAN)(model)


def test_a_layer_whose_cache_is_not_scattered_is_named(decoder):
    model = decoder().build()
    output = next(o for o in model.graph.outputs if o.name == "present.2.value")
    output.producer().op_type = "Concat"
    with pytest.raises(ContractError, match=r"layer 2: .* by Concat and not by TensorScatter"):
        RewireProbabilities(PLAN)(model)
