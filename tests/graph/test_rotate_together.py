"""RotateTogether: queries and keys are rotated as one tensor, and nothing else changes."""

import numpy as np
import pytest

from echoatt_exporter.graph.lowering.cpu.rotate_together import RotateTogether

RNG = np.random.default_rng(31)
WEIGHTS = {
    "w": RNG.standard_normal((8, 20)).astype(np.float32),
    "bias": RNG.standard_normal(20).astype(np.float32),
    "scale": RNG.standard_normal(4).astype(np.float32),
}
ANGLES = RNG.standard_normal((2, 3, 2)).astype(np.float32)
FEEDS = {
    "x": RNG.standard_normal((2, 3, 8)).astype(np.float32),
    "cos": np.cos(ANGLES),
    "sin": np.sin(ANGLES),
    "other": np.cos(2 * ANGLES),
}
INPUTS = """
float[b,s,8] x, float[b,s,2] cos, float[b,s,2] sin, float[b,s,2] other, float[8,20] w,
float[20] bias, float[4] scale
"""
OUTPUTS = "float[b,2,s,4] qr, float[b,1,s,4] kr, z"
BODY = """
sizes = Constant<value_ints=[8,4,8]>()
two = Constant<value_ints=[0,0,2,4]>()
one = Constant<value_ints=[0,0,1,4]>()
p = MatMul(x, w)
q, k, v = Split<axis=-1>(p, sizes)
q4 = Reshape(q, two)
qt = Transpose<perm=[0,2,1,3]>(q4)
qr = RotaryEmbedding(qt, cos, sin)
k4 = Reshape(k, one)
kt = Transpose<perm=[0,2,1,3]>(k4)
kr = RotaryEmbedding(kt, cos, sin)
z = Neg(v)
"""


@pytest.fixture
def attention(model_of):
    """A packed product whose parts are rotated, with changes to its text."""

    def build(*changes, **names):
        body = BODY
        for old, new in changes:
            assert old in body
            body = body.replace(old, new)
        model = model_of(f"g ({INPUTS}) => ({OUTPUTS}) {{ {body} }}", WEIGHTS)
        for old, new in names.items():
            value = model.graph.initializers.pop(old)
            value.name = new
            model.graph.register_initializer(value)
        return model

    return build


EVERY = "RotaryEmbedding("
KEYS = "kr = RotaryEmbedding(kt, cos, sin)"

TOGETHER = {
    "as it stands": [],
    "of a part of the head": [(EVERY, "RotaryEmbedding<rotary_embedding_dim=4>(")],
    "interleaved": [(EVERY, "RotaryEmbedding<interleaved=1>(")],
    "keys before queries": [("q, k, v", "k, q, v"), ("8,4,8]", "4,8,8]")],
    "behind the values": [("q, k, v", "v, q, k"), ("8,4,8]", "8,8,4]")],
    "with a bias": [("p = MatMul(x, w)", "p0 = MatMul(x, w)\np = Add(p0, bias)")],
}


@pytest.mark.parametrize("case", TOGETHER)
def test_two_rotations_become_one(attention, evaluate, difference, ops, case):
    model = attention(*TOGETHER[case])
    before = evaluate(model, FEEDS)
    assert RotateTogether()(model).modified
    counts = ops(model)
    assert counts["RotaryEmbedding"] == counts["Transpose"] == counts["Reshape"] == 1
    assert counts["Split"] == 2
    assert [output.name for output in model.graph.outputs] == ["qr", "kr", "z"]
    # Each number comes from the same ones by the same operators
    assert difference(before, evaluate(model, FEEDS)) == 0
    assert not RotateTogether()(model).modified


LEFT_ALONE = {
    "other angles": [(KEYS, KEYS.replace("cos", "other"))],
    "other attributes": [(KEYS, KEYS.replace("(kt", "<interleaved=1>(kt"))],
    "a norm of the keys": [
        ("kt = ", "kn = RMSNormalization<axis=-1>(k4, scale)\nkt = "),
        ("(k4)\nkr", "(kn)\nkr"),
    ],
    "keys that are not rotated": [(KEYS, "kr = Neg(kt)")],
    "heads behind the tokens": [
        ("kt = Transpose<perm=[0,2,1,3]>", "kt = Transpose<perm=[0,2,3,1]>"),
        (KEYS, "ku = Transpose<perm=[0,1,3,2]>(kt)\n" + KEYS.replace("(kt", "(ku")),
    ],
    "values between queries and keys": [("q, k, v", "q, v, k"), ("8,4,8]", "8,8,4]")],
    "keys that something else reads": [("Neg(v)", "Neg(k)")],
    "keys in heads that something else reads": [("Neg(v)", "Neg(kt)")],
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_rotated_alike_is_left_alone(attention, ops, caplog, case):
    model = attention(*LEFT_ALONE[case])
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not RotateTogether()(model).modified
    assert ops(model) == before
    assert "no two neighbouring parts are rotated alike" in caplog.text
