"""ViewOneToken: for one token heads and tokens change places without a copy."""

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from echoatt_exporter.graph.branches import branches
from echoatt_exporter.graph.canonical.join_decode import JoinDecode
from echoatt_exporter.graph.lowering.cuda.view_one_token import ViewOneToken


def swaps(model):
    """What swaps heads and tokens, in front of the pass."""
    nodes = [node for node in model.graph if node.op_type == "Transpose"]
    return [node for node in nodes if list(node.attributes.get_ints("perm")) == [0, 2, 1, 3]]


@pytest.fixture
def viewed(decoder):
    model = decoder().build()
    assert ViewOneToken()(model).modified
    return model


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("broken", [None, 0, 1])
def test_each_number_of_tokens_takes_its_branch(
    decoder, viewed, evaluate, difference, tokens, broken
):
    feeds = decoder().feeds(tokens)
    for node in viewed.graph:
        if node.op_type == "If" and broken is not None:
            branch = branches(node)[broken]
            wrong = ir.node("Neg", [branch.outputs[0]])
            result, negated = node.outputs[0], wrong.outputs[0]
            negated.name, negated.type = f"{node.name}.wrong", result.type
            branch.append(wrong)
            branch.outputs[0] = wrong.outputs[0]
    found = difference(evaluate(decoder().build(), feeds), evaluate(viewed, feeds))
    assert (found > 0.05) == (broken == (tokens > 1)) if broken is not None else found == 0


def test_it_acts_on_all_heads_and_contexts_by_one_condition(decoder, viewed, ops):
    assert len(swaps(decoder().build())) == ops(viewed)["If"] == 4 * 4
    assert len({n.inputs[0] for n in viewed.graph if n.op_type == "If"}) == 1
    for node in viewed.graph:
        if node.op_type == "If":
            one, many = branches(node)
            assert [n.op_type for n in one] == ["Reshape"]
            assert [n.op_type for n in many] == ["Transpose"]
    assert not ViewOneToken()(viewed).modified


@pytest.mark.parametrize(("sizes", "left"), [({}, 16), ({"seq": 1}, 0)])
def test_the_runtime_takes_a_branch_where_it_knows_the_number(viewed, tmp_path, sizes, left):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    onnxruntime.InferenceSession(
        ir.to_proto(viewed).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert found.count("If") == left
    # What only the condition needed goes with it
    assert found.count("Equal") == (left > 0)
    assert found.count("Gather") == 1 + (left > 0)


def test_joining_gives_the_graph_back(decoder, viewed, ops):
    original = decoder().build()
    # As a bundle is read from its file
    model = ir.from_proto(ir.to_proto(viewed))
    assert JoinDecode()(model).modified
    assert ops(model) == ops(original)
    assert {n.outputs[0].name for n in model.graph} == {n.outputs[0].name for n in original.graph}
    assert ViewOneToken()(model).modified


def other_axes(node):
    node.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])


def no_tokens(node):
    batch, _, *rest = node.inputs[0].shape
    node.inputs[0].shape = ir.Shape([batch, "others", *rest])


def open_heads(node):
    batch, tokens, _, size = node.inputs[0].shape
    node.inputs[0].shape = ir.Shape([batch, tokens, "heads", size])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_axes, "does not swap the middle two of four"),
        (no_tokens, "neither axis is the tokens'"),
        (open_heads, "the number of heads is not fixed"),
    ],
)
def test_what_does_not_match_stays_and_says_why(decoder, ops, caplog, change, reason):
    model = decoder().build()
    change(swaps(model)[0])
    with caplog.at_level("DEBUG"):
        ViewOneToken()(model)
    assert ops(model)["If"] == 4 * 4 - 1
    assert reason in caplog.text
