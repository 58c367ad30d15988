import numpy as np
import onnx_ir as ir
import pytest
from tests.quantisation import to_nearest

from echoatt_exporter.graph import GraphSize
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.graph.roles import Kind, Part, Use, is_weight, role_of, set_role
from echoatt_exporter.graph.sharing.cut_packed_weights import CutPackedWeights
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

PLAN = (0, 1, 1, 0)
RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 32)).astype(np.float32)
WEIGHT = RNG.standard_normal((32, 24)).astype(np.float32)
BIAS = RNG.standard_normal(24).astype(np.float32)


def followers_cut(decoder, layout, **fields):
    model = decoder(layout=layout, **fields).build()
    RewireProbabilities(PLAN)(model)
    RemoveDeadBranches(PLAN)(model)
    return model


@pytest.mark.parametrize("layout", ["packed", "split", "heads"])
def test_only_the_value_columns_of_followers_stay(decoder, evaluate, difference, ops, layout):
    heads = {"query_heads": 2} if layout == "heads" else {}
    tiny = decoder(layout=layout, **heads)
    model = followers_cut(decoder, layout, **heads)
    expected, before = evaluate(model, tiny.feeds()), GraphSize.of(model)

    assert CutPackedWeights()(model).modified

    columns = (tiny.query_heads + tiny.kv_heads) * tiny.head_dim
    # Weight and bias of two followers
    assert before.parameters - GraphSize.of(model).parameters == 2 * (16 + 1) * columns
    # The values of each follower are the whole product: no Slice or Split of it is left
    assert ops(model)["Split"] == (0 if layout == "packed" else 2)
    for layer, source in enumerate(PLAN):
        assert (f"l{layer}_qkv" in model.graph.initializers) == (source == layer)
    assert difference(expected, evaluate(model, tiny.feeds())) < 1e-6
    assert not CutPackedWeights()(model).modified


def add_zero_points(model):
    """Say of every quantised weight what it has by default, as another exporter's graph may."""
    for node in [n for n in model.graph if n.op_type == "MatMulNBits"]:
        bits = node.attributes.get_int("bits")
        columns, blocks = node.inputs[2].shape
        value = 0x88 if bits == 4 else 0x80
        points = np.full((columns, -(-blocks * bits // 8)), value, np.uint8)
        name = f"{node.inputs[1].name}.points"
        initializer = ir.Value(
            name=name,
            const_value=ir.Tensor(points, name=name),
            shape=ir.Shape(points.shape),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        model.graph.register_initializer(initializer)
        node.resize_inputs(4)
        node.replace_input_with(3, initializer)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["split", "heads"])
def test_quantised_weights_are_cut_with_scales_and_zero_points(
    decoder, evaluate, difference, bits, layout
):
    heads = {"query_heads": 2} if layout == "heads" else {}
    tiny = decoder(layout=layout, hidden=96, **heads)
    model = tiny.build()
    RewireProbabilities(PLAN)(model)
    # As it is in a bundle; of weights that are not packed nothing is cut
    QuantizeWeights(to_nearest(bits)).call(model)
    add_zero_points(model)
    RemoveDeadBranches(PLAN)(model)
    expected = evaluate(model, tiny.feeds())

    assert CutPackedWeights()(model).modified

    nodes = [n for n in model.graph if n.op_type == "MatMulNBits" and n.name.endswith(".cut")]
    width = tiny.kv_heads * tiny.head_dim
    assert [node.attributes.get_int("N") for node in nodes] == [width, width]
    assert [[v.shape[0] for v in node.inputs[1:4]] for node in nodes] == [[width] * 3] * 2
    # Columns are quantised independently, so nothing changes
    assert difference(expected, evaluate(model, tiny.feeds())) < 1e-6


def sliced(model_of, parts, tail="y = MatMul(x, w)", extra=""):
    body, outputs = "", ""
    for index, (begin, end) in enumerate(parts):
        body += (
            f"b{index} = Constant<value_ints=[{begin}]>() e{index} = Constant<value_ints=[{end}]>()"
            f" z{index} = Slice(y, b{index}, e{index}, axis)\n"
        )
        outputs += f", float[b,s,{end - begin}] z{index}"
    return model_of(
        f"g (float[b,s,32] x, float[32,24] w, float[24] bias) => ({outputs[2:]}{extra})\n"
        f"<int64[1] axis = {{2}}> {{ {tail}\n {body} }}",
        {"w": WEIGHT, "bias": BIAS},
    )


def test_several_readers_get_their_columns_of_the_smaller_product(model_of, evaluate, ops):
    model = sliced(model_of, [(4, 10), (16, 24), (6, 8)], "y0 = MatMul(x, w)\n y = Add(bias, y0)")
    assert CutPackedWeights()(model).modified
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert list(product.inputs[1].shape) == [32, 14]
    assert ops(model)["Slice"] == 3
    result = evaluate(model, {"x": X})
    whole = X @ WEIGHT + BIAS
    for name, columns in (("z0", slice(4, 10)), ("z1", slice(16, 24)), ("z2", slice(6, 8))):
        np.testing.assert_allclose(result[name], whole[..., columns], atol=2e-5)


def test_a_gemm_with_transposed_weight_is_cut(model_of, evaluate):
    model = model_of(
        "g (float[b,32] x, float[24,32] w, float[24] bias) => (float[b,8] z)\n"
        "<int64[1] begin = {16}, int64[1] end = {24}, int64[1] axis = {1}>\n"
        "{ y = Gemm<transB=1>(x, w, bias)\n z = Slice(y, begin, end, axis) }",
        {"w": WEIGHT.T.copy(), "bias": BIAS},
    )
    assert CutPackedWeights()(model).modified
    product = next(node for node in model.graph if node.op_type == "Gemm")
    assert [list(value.shape) for value in product.inputs[1:]] == [[8, 32], [8]]
    result = evaluate(model, {"x": X[0]})["z"]
    np.testing.assert_allclose(result, (X[0] @ WEIGHT + BIAS)[:, 16:], atol=2e-5)


@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_left_keeps_its_role(model_of, bits):
    queries, keys, values = (
        Part(frozenset({Use(kind, 1)}), 4) for kind in (Kind.QUERIES, Kind.KEYS, Kind.VALUES)
    )
    model = model_of(
        "g (float[b,s,32] x, float[32,24] w) => (float[b,s,2,4] k, float[b,s,2,4] v)\n"
        "<int64[3] three = {0, 0, 2}, int64[1] last = {12}> { y = MatMul(x, w)\n"
        " dims = Concat<axis=0>(three, last)\n r = Reshape(y, dims)\n"
        " q, k, v = Split<axis=-1, num_outputs=3>(r) }",
        {"w": WEIGHT},
    )
    set_role(model.graph.initializers["w"], [queries, keys, values] * 2)
    if bits is not None:
        QuantizeWeights(to_nearest(bits))(model)
    assert CutPackedWeights()(model).modified
    assert [role_of(value) for value in model.graph.initializers.values() if is_weight(value)] == [
        (keys, values, keys, values)
    ] * (1 if bits is None else 2)


def test_every_column_read_is_left_alone(model_of, caplog):
    model = sliced(model_of, [(0, 8), (8, 24)])
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not CutPackedWeights()(model).modified
    assert "every column is read" in caplog.text


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("y0 = MatMul(x, w)\n y = Relu(y0)", "Relu reads all of"),
        ("w2 = Relu(w)\n y = MatMul(x, w2)", "w2 is not a weight"),
    ],
)
def test_a_product_that_must_stay_whole_is_left_alone(model_of, caplog, tail, reason):
    model = sliced(model_of, [(0, 8)], tail)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not CutPackedWeights()(model).modified
    assert reason in caplog.text


def test_a_product_that_is_an_output_is_left_alone(model_of):
    model = sliced(model_of, [(0, 8)], extra=", float[b,s,24] y")
    assert not CutPackedWeights()(model).modified


def test_a_slice_of_rows_is_left_alone(model_of, caplog):
    model = model_of(
        "g (float[b,s,32] x, float[32,24] w) => (float[b,t,24] z)\n"
        "<int64[1] begin = {0}, int64[1] end = {1}, int64[1] axis = {1}>\n"
        "{ y = MatMul(x, w)\n z = Slice(y, begin, end, axis) }",
        {"w": WEIGHT},
    )
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not CutPackedWeights()(model).modified
    assert "not of the last axis" in caplog.text


def test_a_weight_that_is_also_looked_up_stays_beside_its_cut(model_of, evaluate):
    model = model_of(
        "g (float[b,s,32] x, float[32,24] w, int64[2] rows) => (float[b,s,8] z, float[2,24] rest)\n"
        "<int64[1] begin = {16}, int64[1] end = {24}, int64[1] axis = {2}>\n"
        "{ y = MatMul(x, w)\n z = Slice(y, begin, end, axis)\n rest = Gather(w, rows) }",
        {"w": WEIGHT},
    )
    assert CutPackedWeights()(model).modified
    result = evaluate(model, {"x": X, "rows": np.array([3, 4])})
    np.testing.assert_allclose(result["z"], (X @ WEIGHT)[..., 16:], atol=2e-5)
    np.testing.assert_array_equal(result["rest"], WEIGHT[3:5])
