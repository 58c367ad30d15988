import numpy as np
import pytest

from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm

RNG = np.random.default_rng(13)
FEEDS = {name: RNG.standard_normal((2, 3, 8)).astype(np.float32) for name in "ab"}
WEIGHT = (1 + 0.3 * RNG.standard_normal(8)).astype(np.float32)
NORM = "y = RMSNormalization<axis=-1, epsilon=0.01>(t, w)"


def residual(model_of, body, outputs="float[b,s,8] y", inputs="float[b,s,8] a, float[b,s,8] b"):
    model = model_of(f"g ({inputs}, float[8] w) => ({outputs}) {{ {body} }}", {"w": WEIGHT})
    model.graph.opset_imports.pop("com.microsoft", None)
    return model


@pytest.mark.parametrize("body", ["t = Add(a, b)\n", "t = Add(b, a)\n"])
def test_a_sum_that_only_the_norm_reads(model_of, evaluate, ops, difference, body):
    model = residual(model_of, body + NORM)
    before = evaluate(model, FEEDS)
    assert FuseSkipRmsNorm()(model).modified
    assert ops(model) == {"SkipSimplifiedLayerNormalization": 1}
    (node,) = model.graph
    assert len(node.outputs) == 1
    assert model.graph.opset_imports["com.microsoft"] == 1
    assert difference(before, evaluate(model, FEEDS)) < 2e-6


def test_a_sum_that_others_read_comes_out_fourth(model_of, evaluate, ops, difference):
    # The other reader stands between addition and norm
    model = residual(
        model_of, "t = Add(a, b)\n z = Neg(t)\n" + NORM, "float[b,s,8] y, float[b,s,8] z"
    )
    before = evaluate(model, FEEDS)
    assert FuseSkipRmsNorm()(model).modified
    assert ops(model) == {"SkipSimplifiedLayerNormalization": 1, "Neg": 1}
    fused, neg = model.graph
    assert neg.inputs[0] is fused.outputs[3]
    assert difference(before, evaluate(model, FEEDS)) < 2e-6


def test_a_sum_that_is_a_graph_output_keeps_its_name(model_of, evaluate, difference):
    model = residual(model_of, "t = Add(a, b)\n" + NORM, "float[b,s,8] y, float[b,s,8] t")
    before = evaluate(model, FEEDS)
    assert FuseSkipRmsNorm()(model).modified
    assert [output.name for output in model.graph.outputs] == ["y", "t"]
    assert difference(before, evaluate(model, FEEDS)) < 2e-6


def test_two_norms_of_one_sum_share_it(model_of, evaluate, ops, difference):
    model = residual(
        model_of,
        "t = Add(a, b)\n" + NORM + "\n z = RMSNormalization<axis=-1>(t, w)",
        "float[b,s,8] y, float[b,s,8] z",
    )
    before = evaluate(model, FEEDS)
    assert FuseSkipRmsNorm()(model).modified
    assert ops(model) == {"SkipSimplifiedLayerNormalization": 1, "RMSNormalization": 1}
    assert difference(before, evaluate(model, FEEDS)) < 2e-6


def test_a_chain_of_residual_blocks(model_of, evaluate, ops, difference):
    model = residual(
        model_of,
        "t = Add(a, b)\n" + NORM + "\n c = Neg(y)\n u = Add(t, c)\n"
        "z = RMSNormalization<axis=-1>(u, w)\n v = Add(u, z)",
        "float[b,s,8] v",
    )
    before = evaluate(model, FEEDS)
    assert FuseSkipRmsNorm()(model).modified
    assert ops(model) == {"SkipSimplifiedLayerNormalization": 2, "Neg": 1, "Add": 1}
    assert difference(before, evaluate(model, FEEDS)) < 5e-6


REFUSED = {
    "a bias": ("t = Add(a, w)\n" + NORM, {}, "broadcasts"),
    "unknown shapes": (
        "t = Add(a, b)\n" + NORM,
        {"inputs": "float[b,s,8] a, float[c,s,8] b"},
        "broadcasts",
    ),
    "no addition": ("t = Mul(a, b)\n" + NORM, {}, "comes from Mul, not from Add"),
    "another axis": (
        "t = Add(a, b)\n y = RMSNormalization<axis=1>(t, m)",
        {"inputs": "float[b,3,8] a, float[b,3,8] b, float[3,8] m"},
        "weight is not an initializer",
    ),
    "another axis, weight constant": (
        "t = Add(a, b)\n w3 = RMSNormalization<axis=1>(t, w)\n y = Neg(w3)",
        {},
        "not over the last axis",
    ),
    "four dimensions": (
        "t = Add(a, b)\n" + NORM,
        {
            "inputs": "float[b,s,2,8] a, float[b,s,2,8] b",
            "outputs": "float[b,s,2,8] y",
        },
        "does not have three dimensions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_operator_cannot_do_is_left_alone(model_of, ops, caplog, case):
    body, arguments, reason = REFUSED[case]
    model = residual(model_of, body, **arguments)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not FuseSkipRmsNorm()(model).modified
    assert ops(model) == before
    assert reason in caplog.text
    assert "com.microsoft" not in model.graph.opset_imports
