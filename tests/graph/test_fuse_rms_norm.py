import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from tests.wording import says

from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm

RNG = np.random.default_rng(11)
X = RNG.standard_normal((2, 3, 8)).astype(np.float32)
WEIGHT = (1 + 0.3 * RNG.standard_normal(8)).astype(np.float32)

CORE = """
square = Pow(x, two)
mean = ReduceMean<keepdims=1>(square, axes)
shifted = Add(mean, epsilon)
root = Sqrt(shifted)
inverse = Reciprocal(root)
normal = Mul(x, inverse)
"""
CONSTANTS = "float two = {2.0}, float three = {3.0}, float one = {1.0}, float epsilon = {0.01}"


def norm(model_of, body, *, axes="{-1}", dtype="float", extra="", weight=WEIGHT, inputs=""):
    return model_of(
        f"g ({dtype}[b,s,8] x, float[8] w{inputs}) => ({dtype}[b,s,8] y{extra})\n"
        f"<{CONSTANTS}, int64[1] axes = {axes}> {{ {body} }}",
        {"w": weight},
    )


def expected(x, weight=WEIGHT):
    return x / np.sqrt((x.astype(np.float32) ** 2).mean(-1, keepdims=True) + 0.01) * weight


SPELLINGS = {
    "as exported": CORE + "y = Mul(w, normal)",
    "operands swapped": CORE.replace("Add(mean, epsilon)", "Add(epsilon, mean)").replace(
        "Mul(x, inverse)", "Mul(inverse, x)"
    )
    + "y = Mul(normal, w)",
    "square by Mul": CORE.replace("Pow(x, two)", "Mul(x, x)") + "y = Mul(w, normal)",
    "root by Div": CORE.replace("Reciprocal(root)", "Div(one, root)") + "y = Mul(w, normal)",
    "x by Div": CORE.replace("inverse = Reciprocal(root)\n", "").replace(
        "Mul(x, inverse)", "Div(x, root)"
    )
    + "y = Mul(w, normal)",
    "positive axis": CORE + "y = Mul(w, normal)",
    "axis names default keepdims": CORE.replace("<keepdims=1>", "") + "y = Mul(w, normal)",
    "weight plus one": CORE + "w1 = Add(w, one)\n y = Mul(normal, w1)",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_one_operator(model_of, evaluate, ops, spelling):
    model = norm(
        model_of, SPELLINGS[spelling], axes="{2}" if spelling == "positive axis" else "{-1}"
    )
    before = evaluate(model, {"x": X})["y"]
    assert FuseRmsNorm()(model).modified
    assert ops(model) == {"RMSNormalization": 1}
    after = evaluate(model, {"x": X})["y"]
    np.testing.assert_allclose(after, before, atol=2e-6)
    weight = WEIGHT + 1 if spelling == "weight plus one" else WEIGHT
    np.testing.assert_allclose(after, expected(X, weight), atol=2e-6)
    (node,) = model.graph
    assert node.attributes.get_float("epsilon") == pytest.approx(0.01)
    assert not FuseRmsNorm()(model).modified


def test_heads_are_normalised_over_their_own_size(model_of, evaluate, ops):
    model = model_of(
        f"g (float[b,s,32] a, float[8] w) => (float[b,s,4,8] y)\n"
        f"<{CONSTANTS}, int64[1] axes = {{-1}}, int64[4] dims = {{0,0,4,8}}>"
        f"{{ x = Reshape(a, dims)\n {CORE} y = Mul(w, normal) }}",
        {"w": WEIGHT},
    )
    a = RNG.standard_normal((2, 3, 32)).astype(np.float32)
    assert FuseRmsNorm()(model).modified
    assert ops(model) == {"Reshape": 1, "RMSNormalization": 1}
    np.testing.assert_allclose(
        evaluate(model, {"a": a})["y"], expected(a.reshape(2, 3, 4, 8)), atol=2e-6
    )


CORE_32 = CORE.replace("(x,", "(x32,")
HALF = {
    "llama": CORE_32 + "half = Cast<to=10>(normal)\n y = Mul(w16, half)",
    "olmo2": CORE_32
    + "w32 = Cast<to=1>(w16)\n scaled = Mul(w32, normal)\n y = Cast<to=10>(scaled)",
    "gemma": CORE_32 + "w32 = Cast<to=1>(w16)\n w1 = Add(one, w32)\n"
    "scaled = Mul(normal, w1)\n y = Cast<to=10>(scaled)",
}
CASTS = "w16 = Cast<to=10>(w)\n x32 = Cast<to=1>(x)\n"


def half_norm(model_of, form):
    return norm(model_of, CASTS + HALF[form], dtype="float16")


@pytest.mark.parametrize(
    ("form", "left"),
    [
        ("llama", {"RMSNormalization": 1}),
        ("olmo2", {"RMSNormalization": 1}),
        ("gemma", {"Cast": 2, "RMSNormalization": 1}),
    ],
)
def test_half_precision_forms(model_of, evaluate, ops, form, left):
    model = half_norm(model_of, form)
    x = X.astype(np.float16)
    before = evaluate(model, {"x": x})["y"]
    assert FuseRmsNorm()(model).modified
    assert ops(model) == left
    after = evaluate(model, {"x": x})["y"]
    assert after.dtype == np.float16
    # Half precision has a relative step of 2^-10; the two may round at different places
    np.testing.assert_allclose(after, before, rtol=2e-3, atol=1e-3)
    fused = next(node for node in model.graph if node.op_type == "RMSNormalization")
    wanted = ir.DataType.FLOAT if form == "gemma" else ir.DataType.FLOAT16
    assert [value.dtype for value in (*fused.inputs, *fused.outputs)] == [wanted] * 3


def test_one_plus_weight_is_not_rounded(model_of):
    model = half_norm(model_of, "gemma")
    FuseRmsNorm()(model)
    fused = next(node for node in model.graph if node.op_type == "RMSNormalization")
    scale = fused.inputs[1].const_value.numpy()
    np.testing.assert_array_equal(scale, WEIGHT.astype(np.float16).astype(np.float32) + 1)
    assert not np.array_equal(scale.astype(np.float16).astype(np.float32), scale)


def test_bfloat16_is_fused_in_bfloat16(model_of, ops):
    text = (CASTS + HALF["llama"]).replace("to=10", "to=16")
    model = norm(model_of, text, dtype="bfloat16")
    assert FuseRmsNorm()(model).modified
    (fused,) = model.graph
    np.testing.assert_array_equal(
        fused.inputs[1].const_value.numpy(), WEIGHT.astype(ml_dtypes.bfloat16)
    )


def test_an_intermediate_cast_that_others_read_stays(model_of, evaluate, ops):
    model = norm(
        model_of, CASTS + HALF["llama"] + "\n z = Neg(x32)", dtype="float16",
        extra=", float[b,s,8] z",
    )  # fmt: skip
    assert FuseRmsNorm()(model).modified
    assert ops(model) == {"Cast": 1, "Neg": 1, "RMSNormalization": 1}
    np.testing.assert_array_equal(
        evaluate(model, {"x": X.astype(np.float16)})["z"], -X.astype(np.float16).astype(np.float32)
    )


PLAIN = CORE + "y = Mul(w, normal)"
REFUSED = {
    "exponent": (PLAIN.replace("Pow(x, two)", "Pow(x, three)"), {}, "the exponent is not 2"),
    "axis": (PLAIN, {"axes": "{1}"}, "not over the last axis"),
    "keepdims": (
        PLAIN.replace("keepdims=1", "keepdims=0").replace(
            "shifted = Add(mean", "kept = Unsqueeze(mean, axes)\n shifted = Add(kept"
        ),
        {},
        "does not keep its dimension",
    ),
    "epsilon": (
        PLAIN.replace("Add(mean, epsilon)", "Add(mean, e)"),
        {"inputs": ", float[1] e"},
        "e is not constant",
    ),
    "no epsilon": (
        PLAIN.replace("shifted = Add(mean, epsilon)\n", "").replace("Sqrt(shifted)", "Sqrt(mean)"),
        {},
        "is read by Sqrt, not by Add",
    ),
    "different inputs": (
        PLAIN.replace("Mul(x, inverse)", "Mul(other, inverse)"),
        {"inputs": ", float[b,s,8] other"},
        "have different inputs",
    ),
    "product, not square": (
        PLAIN.replace("Pow(x, two)", "Mul(x, other)"),
        {"inputs": ", float[b,s,8] other"},
        "of a product, not of a square",
    ),
    "square used elsewhere": (
        PLAIN + "\n z = Neg(square)",
        {"extra": ", float[b,s,8] z"},
        "square is used elsewhere",
    ),
    "normal used elsewhere": (
        PLAIN + "\n z = Neg(normal)",
        {"extra": ", float[b,s,8] z"},
        "normal is used elsewhere",
    ),
    "root is an output": (PLAIN, {"extra": ", float[b,s,1] root"}, "root is a graph output"),
    "inverse root": (
        PLAIN.replace("inverse = Reciprocal(root)\n", "").replace(
            "Mul(x, inverse)", "Div(root, x)"
        ),
        {},
        "the root is divided",
    ),
    "weight varies": (
        PLAIN.replace("Mul(w, normal)", "Mul(v, normal)"),
        {"inputs": ", float[8] v"},
        "v is not a weight",
    ),
    "weight is a matrix": (
        PLAIN.replace("Mul(w, normal)", "Mul(m, normal)"),
        {"inputs": ", float[3,8] m"},
        "m is not a weight",
    ),
    "no weight": (CORE + "y = Neg(normal)", {}, "is read by Neg"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_rms_norm_is_left_alone_and_the_reason_is_logged(model_of, ops, caplog, case):
    body, arguments, reason = REFUSED[case]
    model = norm(model_of, body, **arguments)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not FuseRmsNorm()(model).modified
    assert ops(model) == before
    assert says(caplog.text, reason)


def test_another_domains_mean_is_left_alone(model_of):
    model = norm(model_of, PLAIN)
    next(node for node in model.graph if node.op_type == "ReduceMean").domain = "com.example"
    assert not FuseRmsNorm()(model).modified
