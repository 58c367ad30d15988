"""K rows, N columns."""

import numpy as np
import onnx_ir as ir
import pytest
from tests.quantisation import to_nearest
from tests.wording import says

from echoatt_exporter.graph import GraphSize
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights

RNG = np.random.default_rng(23)


def product(model_of, weight, dtype="float", extra_body="", extra_output=""):
    K, N = weight.shape
    return model_of(
        f"g ({dtype}[b,{K}] x, {dtype}[{K},{N}] w) => ({dtype}[b,{N}] y{extra_output})\n"
        f"{{ y = MatMul(x, w)\n {extra_body} }}",
        {"w": weight},
    )


def dequantized(node, K, bits):
    """The weight that a MatMulNBits node stands for, by the operator's documentation."""
    packed, scales = (value.const_value.numpy() for value in node.inputs[1:])
    N = len(packed)

    def unpack(array):
        if bits == 8:
            return array.astype(np.float32)
        return np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)

    values = unpack(packed).astype(np.float32)
    blocked = (values - 2.0 ** (bits - 1)) * scales.astype(np.float32)[..., None]
    return blocked.reshape(N, -1)[:, :K].T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("K", [64, 100, 7])
def test_weights_are_quantised_within_a_step(model_of, evaluate, ops, bits, K):
    weight = RNG.standard_normal((K, 24)).astype(np.float32)
    model = product(model_of, weight)
    assert QuantizeWeights(to_nearest(bits))(model).modified
    assert ops(model) == {"MatMulNBits": 1}
    (node,) = model.graph
    assert len(node.inputs) == 3
    assert {name: node.attributes.get_int(name) for name in ("K", "N", "bits", "block_size")} == {
        "K": K, "N": 24, "bits": bits, "block_size": 32,
    }  # fmt: skip
    assert node.attributes.get_int("accuracy_level") == 4

    error = np.abs(dequantized(node, K, bits) - weight)
    blocks = -(-K // 32)
    step = np.repeat(np.abs(node.inputs[2].const_value.numpy()), 32, axis=1)[:, :K].T
    # The largest element may be up to a step outside the levels
    assert np.all(error <= step * 1.2)
    assert np.sqrt((error**2).mean()) < (0.12 if bits == 4 else 0.008)
    assert node.inputs[1].shape == [24, blocks, 32 * bits // 8]

    x = RNG.standard_normal((5, K)).astype(np.float32)
    result = evaluate(model, {"x": x})["y"]
    # accuracy_level 4 rounds the activations to 8 bits as well
    scale = np.linalg.norm(x @ weight)
    assert np.linalg.norm(result - x @ dequantized(node, K, bits)) / scale < 0.02
    assert np.linalg.norm(result - x @ weight) / scale < (0.15 if bits == 4 else 0.02)


def test_float16_weights_keep_float16_scales(model_of, evaluate):
    weight = RNG.standard_normal((64, 16)).astype(np.float16)
    model = product(model_of, weight, dtype="float16")
    assert QuantizeWeights(to_nearest(8))(model).modified
    (node,) = model.graph
    assert node.inputs[2].dtype == ir.DataType.FLOAT16
    x = RNG.standard_normal((3, 64)).astype(np.float16)
    result = evaluate(model, {"x": x})["y"].astype(np.float32)
    exact = x.astype(np.float32) @ weight.astype(np.float32)
    assert np.linalg.norm(result - exact) / np.linalg.norm(exact) < 0.02


def test_a_weight_is_quantised_when_it_is_written_once_and_not_kept(model_of, monkeypatch):
    from echoatt_exporter.graph.lowering import quantized_weight

    calls = []
    original = quantized_weight.quantize_blocks
    monkeypatch.setattr(
        quantized_weight,
        "quantize_blocks",
        lambda *arguments: calls.append(1) or original(*arguments),
    )
    model = product(model_of, RNG.standard_normal((64, 16)).astype(np.float32))
    QuantizeWeights(to_nearest(4))(model)
    assert GraphSize.of(model).bytes == 16 * 2 * 16 + 16 * 2 * 4
    assert calls == []
    (node,) = model.graph
    first = [value.const_value.tobytes() for value in node.inputs[1:]]
    assert calls == [1]
    # Writing the model again works and gives the same
    assert [value.const_value.tobytes() for value in node.inputs[1:]] == first
    assert calls == [1, 1]


def test_two_products_of_one_weight_share_it(model_of, evaluate, ops):
    weight = RNG.standard_normal((32, 16)).astype(np.float32)
    model = model_of(
        "g (float[b,32] x, float[b,32] z, float[32,16] w) => (float[b,16] y, float[b,16] v)\n"
        "{ y = MatMul(x, w)\n v = MatMul(z, w) }",
        {"w": weight},
    )
    assert QuantizeWeights(to_nearest(8))(model).modified
    assert ops(model) == {"MatMulNBits": 2}
    first, second = model.graph
    assert first.inputs[1:] == second.inputs[1:]
    assert len(model.graph.initializers) == 2


def test_a_table_that_is_also_looked_up_stays_float(model_of, evaluate, ops):
    weight = RNG.standard_normal((32, 16)).astype(np.float32)
    model = product(
        model_of, weight,
        "float", "index = Constant<value_ints=[3]>()\n row = Gather(w, index)", ", float[1,16] row",
    )  # fmt: skip
    assert QuantizeWeights(to_nearest(4))(model).modified
    assert ops(model) == {"MatMulNBits": 1, "Gather": 1, "Constant": 1}
    result = evaluate(model, {"x": np.zeros((1, 32), np.float32)})
    np.testing.assert_array_equal(result["row"], weight[3:4])


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        (
            "g (float[b,s,8] x, float[8,8] w) => (float[b,s,s] y)\n"
            "{ t = Transpose<perm=[0,2,1]>(x)\n y = MatMul(x, t) }",
            np.zeros((8, 8), np.float32),
            "t is not a weight",
        ),
        (
            "g (float[b,s,8] x, float[2,8,8] w) => (float[b,s,8] y) { y = MatMul(x, w) }",
            np.zeros((2, 8, 8), np.float32),
            "w has 3 dimensions, not 2",
        ),
        (
            "g (double[b,8] x, double[8,8] w) => (double[b,8] y) { y = MatMul(x, w) }",
            np.zeros((8, 8), np.float64),
            "w is DOUBLE",
        ),
    ],
)
def test_other_products_are_left_alone(model_of, ops, caplog, text, weight, reason):
    model = model_of(text, {"w": weight})
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not QuantizeWeights(to_nearest(4))(model).modified
    assert ops(model) == before
    assert says(caplog.text, reason)
