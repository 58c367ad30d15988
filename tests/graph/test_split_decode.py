"""SplitDecode and what takes its branches away again, JoinDecode."""

from collections import Counter

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from echoatt_exporter.graph.attention import find_attention
from echoatt_exporter.graph.branches import branches, captured
from echoatt_exporter.graph.canonical.join_decode import JoinDecode
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

PLAN = (0, 1, 1, 0)
# Float sums in another order
TOLERANCE = 2e-6


def ifs(model):
    return [node for node in model.graph if node.op_type == "If"]


def kinds(branch):
    return [node.op_type for node in branch]


def producer(model, layer):
    reshape = find_attention(model.graph, layer).probabilities.producer()
    assert reshape.op_type == "Reshape"
    return reshape.inputs[0].producer()


@pytest.fixture
def split(decoder):
    def build(**fields):
        model = decoder(**fields).build()
        assert SplitDecode()(model).modified
        return model

    return build


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("followers", [(), (2, 3)])
def test_numbers_stay(decoder, split, evaluate, difference, tokens, followers):
    fields = {"sources": PLAN, "followers": followers} if followers else {}
    feeds = decoder().feeds(tokens)
    expected = evaluate(decoder(**fields).build(), feeds)
    assert difference(expected, evaluate(split(**fields), feeds)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("product", ["scores", "context"])
def test_only_the_branch_for_the_number_of_tokens_runs(
    decoder, split, evaluate, difference, tokens, broken, product
):
    feeds, model = decoder().feeds(tokens), split()
    for layer in range(4):
        node = producer(model, layer)
        if product == "context":
            node = find_attention(model.graph, layer).context
        branch = branches(node)[broken]
        wrong = ir.node("Neg", [branch.outputs[0]])
        wrong.outputs[0].name, wrong.outputs[0].type = f"{node.name}.wrong", node.outputs[0].type
        branch.append(wrong)
        branch.outputs[0] = wrong.outputs[0]
    found = difference(evaluate(decoder().build(), feeds), evaluate(model, feeds))
    runs = tokens > 1
    assert (found > 0.05) if broken == runs else (found < TOLERANCE)


def test_scores_and_contexts_are_split_on_one_condition(split, ops):
    model = split(sources=PLAN, followers=(2, 3))
    assert ops(model)["If"] == 2 + 4
    assert ops(model)["Equal"] == 1
    assert len({node.inputs[0] for node in ifs(model)}) == 1
    # Nothing of a cache is left in the main graph but its update
    assert "Softmax" not in ops(model)
    (scores, *_) = (producer(model, layer) for layer in (0, 1))
    one, many = branches(scores)
    assert kinds(one) == ["FusedMatMul", "Transpose", "Add", "Softmax"]
    # A Reshape at a branch's end would copy the probabilities; it stays outside
    assert kinds(many) == ["Transpose", "MatMul", "Reshape", "Add", "Softmax"]
    one, many = branches(find_attention(model.graph, 2).context)
    assert kinds(one) == ["FusedMatMul", "Transpose"]
    assert kinds(many) == ["Transpose", "Reshape", "MatMul"]


def test_caches_are_the_left_operands_for_one_token(split):
    model = split()
    caches = {output.name: output for output in model.graph.outputs}
    attention = find_attention(model.graph, 1)
    product = next(iter(branches(attention.context)[0]))
    assert product.inputs[0] is caches["present.1.value"]
    assert product.inputs[1] is attention.probabilities
    product = next(iter(branches(producer(model, 1))[0]))
    assert product.inputs[0] is caches["present.1.key"]
    both = {caches["present.1.value"], attention.probabilities}
    assert captured(attention.context) == [both, both]


def test_a_scaling_right_behind_the_product_is_folded_in_and_a_cap_is_kept(
    decoder, evaluate, difference
):
    def capped():
        model = decoder().build()
        for layer in range(4):
            reshape = next(n for n in model.graph if n.outputs[0].name == f"l{layer}_s4")
            value = reshape.inputs[0]
            scale = model.graph.initializers["scale"]
            for op, inputs in (("Mul", [scale]), ("Div", [scale]), ("Tanh", []), ("Mul", [scale])):
                node = ir.node(op, [value, *inputs])
                node.outputs[0].name = f"{reshape.outputs[0].name}.{op}.{value.name}"
                node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
                model.graph.insert_before(reshape, node)
                value = node.outputs[0]
            reshape.replace_input_with(0, value)
        return model

    model = capped()
    SplitDecode()(model)
    one, many = branches(producer(model, 0))
    assert kinds(one) == ["FusedMatMul", "Transpose", "Div", "Tanh", "Mul", "Add", "Softmax"]
    assert next(iter(one)).attributes.get_float("alpha") == pytest.approx(0.5)
    assert kinds(many)[1:6] == ["MatMul", "Mul", "Div", "Tanh", "Mul"]
    for tokens in (1, 3):
        feeds = decoder().feeds(tokens)
        assert difference(evaluate(capped(), feeds), evaluate(model, feeds)) < TOLERANCE


def test_the_runtimes_optimiser_leaves_the_written_out_values(decoder, split, tmp_path):
    model = split(sources=PLAN, followers=(2, 3))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    found = Counter(
        tuple(node.op_type for node in attribute.g.node)
        for node in graph.node
        if node.op_type == "If"
        for attribute in node.attribute
    )
    assert found["Transpose", "Reshape", "MatMul"] == 4
    assert found["FusedMatMul", "Transpose"] == 4
    assert found["FusedMatMul", "Transpose", "Add", "Softmax"] == 2


def read_transposed_cache_twice(model):
    view = find_attention(model.graph, 3).context.inputs[1]
    give_out(model, view)


def read_scores(model):
    give_out(model, next(n for n in model.graph if n.outputs[0].name == "l3_sm").outputs[0])


def half_cache(model):
    cache = next(o for o in model.graph.outputs if o.name == "present.3.value")
    cache.type = ir.TensorType(ir.DataType.FLOAT16)


def other_softmax_axis(model):
    softmax = next(n for n in model.graph if n.outputs[0].name == "l3_p4")
    softmax.attributes["axis"] = ir.AttrInt64("axis", 1)


def mask_by_head(model):
    add = next(n for n in model.graph if n.outputs[0].name == "l3_sm")
    mask = ir.Value(
        name="mask_of_heads",
        shape=ir.Shape(["batch", 4, "seq", "capacity"]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    model.graph.inputs.append(mask)
    add.replace_input_with(1, mask)


def foreign_operator(model):
    next(n for n in model.graph if n.outputs[0].name == "l3_sm").op_type = "Max"


def give_out(model, value):
    extra = ir.node("Identity", [value])
    extra.outputs[0].name = "extra"
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (read_transposed_cache_twice, "l3_vv is used elsewhere too"),
        (read_scores, "l3_sm is not read once"),
        (half_cache, "FusedMatMul has a CPU kernel for float32 only"),
        (other_softmax_axis, "the Softmax is not of the last axis"),
        (mask_by_head, "heads are told apart"),
        (foreign_operator, "Max stands between scores and probabilities"),
    ],
)
def test_what_does_not_match_stays_and_says_why(decoder, ops, caplog, change, reason):
    model = decoder().build()
    change(model)
    with caplog.at_level("DEBUG"):
        SplitDecode()(model)
    assert ops(model)["If"] == 2 * 4 - 1
    assert ops(model)["MatMul"] == ops(decoder().build())["MatMul"] - (2 * 4 - 1)
    assert reason in caplog.text


def test_it_does_nothing_twice(split):
    assert not SplitDecode()(split()).modified


def test_joining_gives_the_graph_back(decoder, split, ops, evaluate, difference):
    original, model = decoder().build(), split()
    # As a bundle is read from its file
    model = ir.from_proto(ir.to_proto(model))
    assert JoinDecode()(model).modified
    assert ops(model) == ops(original)
    assert {n.outputs[0].name for n in model.graph} == {n.outputs[0].name for n in original.graph}
    feeds = decoder().feeds()
    assert difference(evaluate(original, feeds), evaluate(model, feeds)) == 0
    assert not JoinDecode()(model).modified
    RewireProbabilities(PLAN)(model)
    assert SplitDecode()(model).modified


def test_an_if_on_something_else_stays(split, caplog):
    model = split()
    number = next(n for n in model.graph if n.op_type == "Equal").inputs[0].producer()
    number.attributes["start"], number.attributes["end"] = (
        ir.AttrInt64("start", 0),
        ir.AttrInt64("end", 1),
    )
    with caplog.at_level("DEBUG"):
        assert not JoinDecode()(model).modified
    assert "it is not about the number of tokens" in caplog.text
