"""GatherEarly: the last layer's rows that nobody wants are not computed, and the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from tests.quantisation import to_nearest

from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.graph.lowering.gather_early import GatherEarly
from echoatt_exporter.graph.lowering.pack_projections import PackProjections
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights

RNG = np.random.default_rng(29)
FEEDS = {
    "a": RNG.standard_normal((2, 5, 8)).astype(np.float32),
    "b": RNG.standard_normal((2, 5, 8)).astype(np.float32),
    "logits_indices": np.array([[4, 0, 4], [2, 2, 1]]),
}
WEIGHTS = {
    "w": RNG.standard_normal((8, 8)).astype(np.float32),
    "n": (1 + 0.3 * RNG.standard_normal(8)).astype(np.float32),
    "axis": np.array([2]),
    "shape": np.array([1, 1, 8]),
    "half": np.array([0.5], np.float32),
    "long": RNG.standard_normal((5, 8)).astype(np.float32),
}
LOOKUP = """
column = Unsqueeze(logits_indices, axis)
index = Expand(column, shape)
y = GatherElements<axis=1>(h, index)
"""


@pytest.fixture
def looked_up(model_of):
    """A graph that computes `h` from `a` and `b` and looks the wanted rows of it up."""

    def build(body, outputs="float[b,n,8] y", lookup=LOOKUP):
        declared = ["float[b,s,8] a", "float[b,s,8] b", "int64[b,n] logits_indices"]
        names = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
        declared += [
            f"{names[value.dtype]}[{','.join(map(str, value.shape))}] {name}"
            for name, value in WEIGHTS.items()
        ]
        return model_of(f"g ({', '.join(declared)}) => ({outputs}) {{ {body}{lookup} }}", WEIGHTS)

    return build


def rows_of(value):
    """Whose rows a value has: of the call's tokens, or of the wanted ones."""
    return str(value.shape[1])


MOVED = {
    "a product": ("h = MatMul(a, w)", {"MatMul": "n"}, 1),
    "a residual block": (
        "o = MatMul(a, w) t = Add(b, o) m = RMSNormalization<axis=-1>(t, n) g = MatMul(m, w)"
        " z = Sigmoid(g) u = Mul(g, z) d = MatMul(u, w) h = Add(t, d)",
        {"MatMul": "n", "RMSNormalization": "n", "Sigmoid": "n", "Add": "n", "Mul": "n"},
        2,
    ),
    "a fused norm and a Split": (
        "o = MatMul(a, w) t = Add(b, o) m = RMSNormalization<axis=-1>(t, n)"
        " g = MatMul(m, w) l, r = Split<axis=-1, num_outputs=2>(g) c = Mul(l, r)"
        " f = Concat<axis=-1>(c, c) k = MatMul(f, w) h = Add(t, k)",
        # A Concat stops it: there the rows are looked up, and of the residual stream
        {"Split": "s", "Concat": "s", "Add": "n"},
        2,
    ),
    "operands of one row": (
        "o = MatMul(a, w) p = Mul(o, half) h = Add(p, n)",
        {"MatMul": "n", "Mul": "n", "Add": "n"},
        1,
    ),
    "a value read twice": ("o = MatMul(a, w) h = Mul(o, o)", {"MatMul": "n", "Mul": "n"}, 1),
    "rows that others read": (
        "o = MatMul(a, w) x = Neg(o) h = MatMul(o, w)",
        {"Neg": "s", "MatMul": {"s", "n"}},
        1,
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_what_only_the_lookup_reads_has_the_wanted_rows(looked_up, evaluate, difference, ops, case):
    body, expected, lookups = MOVED[case]
    outputs = "float[b,n,8] y" + (", float[b,s,8] x" if "x = " in body else "")
    model = looked_up(body, outputs)
    before = evaluate(model, FEEDS)
    if "fused" in case:
        assert FuseSkipRmsNorm()(model).modified
    assert GatherEarly()(model).modified
    for op, rows in expected.items():
        found = {rows_of(node.outputs[0]) for node in model.graph if node.op_type == op}
        assert found == (rows if isinstance(rows, set) else {rows})
    assert ops(model)["GatherElements"] == lookups
    assert (ops(model)["Unsqueeze"], ops(model)["Expand"]) == (1, 1)
    assert model.graph.outputs[0].name == "y"
    assert difference(before, evaluate(model, FEEDS)) < 2e-6


LEFT_ALONE = {
    "no product": ("h = Add(a, b)", LOOKUP, "no product in front of it"),
    "the product is read elsewhere": (
        "h = MatMul(a, w) x = Neg(h)",
        LOOKUP,
        "no product in front of it",
    ),
    "a graph output": ("x = MatMul(a, w) h = Neg(x)", LOOKUP, "no product in front of it"),
    "a product of two computed values": (
        "t = Transpose<perm=[0,2,1]>(b) p = MatMul(a, t) h = MatMul(p, b)",
        LOOKUP,
        "no product in front of it",
    ),
    "a norm over rows too": (
        "o = MatMul(a, w) h = LayerNormalization<axis=1>(o, long)",
        LOOKUP,
        "no product in front of it",
    ),
    "a Split of rows": (
        "o = MatMul(a, w) h = Split<axis=1, num_outputs=1>(o)",
        LOOKUP,
        "no product in front of it",
    ),
    "a constant for each row": (
        "o = MatMul(a, w) h = Add(o, long)",
        LOOKUP,
        "no product in front of it",
    ),
    "a value for every row of the batch": (
        "c = Constant<value_ints=[0]>() m = ReduceMean<keepdims=1>(b, c) o = MatMul(a, w)"
        " h = Add(o, m)",
        LOOKUP,
        "no product in front of it",
    ),
    "another look-up": (
        "h = MatMul(a, w)",
        LOOKUP.replace("Unsqueeze(logits_indices", "Unsqueeze(others").replace(
            "column =", "others = Abs(logits_indices) column ="
        ),
        "the look-up is not by logits_indices",
    ),
    "along the features": (
        "h = MatMul(a, w)",
        LOOKUP.replace("axis=1>(h", "axis=2>(h"),
        "the look-up is not along the tokens",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_of_rows_apart_is_left_alone(looked_up, ops, caplog, case):
    body, lookup, reason = LEFT_ALONE[case]
    outputs = "float[b,n,8] y" + (", float[b,s,8] x" if "x = " in body else "")
    model = looked_up(body, outputs, lookup)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not GatherEarly()(model).modified
    assert ops(model) == before
    assert reason in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_decoders_last_layer_computes_the_wanted_rows_behind_its_attention(
    decoder, evaluate, difference, dtype, tokens
):
    def built():
        model = decoder(hidden=32).build()
        passes = [FuseRmsNorm(), FuseSkipRmsNorm(), PackProjections()]
        for transform in passes + ([QuantizeWeights(to_nearest(4))] if dtype == "int4" else []):
            assert transform(model).modified
        return model

    feeds = decoder().feeds(tokens)
    model = built()
    assert GatherEarly()(model).modified
    product = "MatMulNBits" if dtype == "int4" else "MatMul"
    weights = [
        node for node in model.graph if node.op_type == product and node.inputs[1].is_initializer()
    ]
    # Of four layers' packed projections, output, gate with up, down, and the head
    assert [rows_of(node.outputs[0]) for node in weights] == ["seq"] * 13 + ["n"] * 4
    assert difference(evaluate(built(), feeds), evaluate(model, feeds)) < 2e-5
    # A bundle that is rewritten has it behind it
    again = ir.from_proto(ir.to_proto(model))
    assert not GatherEarly()(again).modified
