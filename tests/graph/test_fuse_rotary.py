import numpy as np
import pytest

from echoatt_exporter.graph.canonical.fuse_rotary import FuseRotary

RNG = np.random.default_rng(17)
FREQUENCIES = np.array([1.0, 0.3, 0.05], np.float32)
POSITIONS = np.array([[3, 4, 5, 6], [0, 1, 2, 3]])

ANGLES = """
p3 = Unsqueeze(positions, two)
pf = Cast<to=1>(p3)
f = Mul(pf, frequencies)
ff = Concat<axis=-1>(f, f)
c = Cos(ff)
s = Sin(ff)
cos = Unsqueeze(c, one)
sin = Unsqueeze(s, one)
"""
ROTATION = """
low = Slice(x, zero, half, three, one)
high = Slice(x, half, end, three, one)
minus = Neg(high)
turned = Concat<axis=-1>(minus, low)
straight = Mul(x, cos)
crossed = Mul(turned, sin)
y = Add(straight, crossed)
"""
PARTIAL = (
    "x = Slice(h, zero, size, three, one)\n rest = Slice(h, size, end, three, one)\n"
    + ROTATION.replace("y = Add", "part = Add")
    + "y = Concat<axis=-1>(part, rest)"
)
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},"
    "int64[1] half = {3}, int64[1] size = {6}, int64[1] end = {9223372036854775807},"
    "float scaling = {1.25}"
)


def rotary(
    model_of, body, *, x="float[b,2,t,6] x", y="float[b,2,t,6] y", angles=ANGLES, more="", extra=""
):
    return model_of(
        f"g ({x}, int64[b,t] positions, float[3] frequencies{more}) => ({y}{extra})\n"
        f"<{CONSTANTS}> {{ {angles} {body} }}",
        {"frequencies": FREQUENCIES},
    )


def feeds(width=6, dtype=np.float32, name="x"):
    x = RNG.standard_normal((2, 2, 4, width)).astype(dtype)
    return {name: x, "positions": POSITIONS}


def expected(x, scaling=1.0):
    """Rotation written with complex numbers, which shares nothing with the graph's."""
    rotated, rest = x[..., :6], x[..., 6:]
    turn = np.exp(1j * POSITIONS[:, None, :, None] * FREQUENCIES) * scaling
    result = (rotated[..., :3] + 1j * rotated[..., 3:]) * turn
    return np.concatenate([result.real, result.imag, rest], axis=-1)


SPELLINGS = {
    "as exported": (ANGLES, ROTATION, 1.0),
    "operands swapped": (
        ANGLES,
        ROTATION.replace("Mul(x, cos)", "Mul(cos, x)")
        .replace("Mul(turned, sin)", "Mul(sin, turned)")
        .replace("Add(straight, crossed)", "Add(crossed, straight)"),
        1.0,
    ),
    "attention scaling": (
        ANGLES.replace("Unsqueeze(c,", "Unsqueeze(cm,").replace("Unsqueeze(s,", "Unsqueeze(sm,")
        .replace("cos =", "cm = Mul(c, scaling)\n sm = Mul(scaling, s)\n cos ="),
        ROTATION,
        1.25,
    ),
    "duplicated after cosine": (
        ANGLES.replace("ff = Concat<axis=-1>(f, f)\nc = Cos(ff)\ns = Sin(ff)",
        "ch = Cos(f)\n sh = Sin(f)\n c = Concat<axis=2>(ch, ch)\n s = Concat<axis=2>(sh, sh)"),
        ROTATION,
        1.0,
    ),
    "bounds from the end": (ANGLES, ROTATION.replace("half, end", "minus_half, end"), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_one_operator(model_of, evaluate, ops, spelling):
    angles, body, scaling = SPELLINGS[spelling]
    if "minus_half" in body:
        body = "minus_half = Constant<value_ints=[-3]>()\n" + body
    model = rotary(model_of, body, angles=angles)
    data = feeds()
    before = evaluate(model, data)["y"]
    assert FuseRotary()(model).modified
    counts = ops(model)
    assert counts["RotaryEmbedding"] == 1
    assert not {"Neg", "Slice", "Concat", "Add"} & set(counts)
    after = evaluate(model, data)["y"]
    np.testing.assert_allclose(after, before, atol=2e-6)
    np.testing.assert_allclose(after, expected(data["x"], scaling), atol=2e-6)
    assert not FuseRotary()(model).modified


def test_partial_rotation_takes_the_concatenation_along(model_of, evaluate, ops):
    model = rotary(model_of, PARTIAL, x="float[b,2,t,10] h", y="float[b,2,t,10] y")
    data = feeds(10, name="h")
    before = evaluate(model, data)["y"]
    assert FuseRotary()(model).modified
    assert not {"Neg", "Slice", "Concat", "Add"} & set(ops(model))
    (fused,) = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert fused.attributes.get_int("rotary_embedding_dim") == 6
    after = evaluate(model, data)["y"]
    np.testing.assert_allclose(after, before, atol=2e-6)
    np.testing.assert_allclose(after, expected(data["h"]), atol=2e-6)
    np.testing.assert_array_equal(after[..., 6:], data["h"][..., 6:])


@pytest.mark.parametrize(
    "change",
    [
        ("Concat<axis=-1>(part, rest)", "Concat<axis=-1>(rest, part)"),
        ("rest = Slice(h, size, end", "rest = Slice(h, zero, four"),
        ("rest = Slice(h, size", "rest = Slice(other, size"),
    ],
)
def test_a_concatenation_of_something_else_stays(model_of, evaluate, ops, change):
    body = "four = Constant<value_ints=[4]>()\n" + PARTIAL.replace(*change)
    model = rotary(
        model_of, body, x="float[b,2,t,10] h", y="float[b,2,t,10] y", more=", float[b,2,t,10] other"
    )
    data = feeds(10, name="h") | {"other": RNG.standard_normal((2, 2, 4, 10)).astype(np.float32)}
    before = evaluate(model, data)["y"]
    assert FuseRotary()(model).modified
    assert ops(model)["Concat"] == 1
    np.testing.assert_allclose(evaluate(model, data)["y"], before, atol=2e-6)


def test_half_precision_is_rotated_in_float32_between_its_casts(model_of, evaluate, ops):
    body = (
        ROTATION.replace("Mul(x, cos)", "Mul(x32, cos)")
        .replace("Mul(turned, sin)", "Mul(turned32, sin)")
        .replace("straight =", "x32 = Cast<to=1>(x)\n turned32 = Cast<to=1>(turned)\n straight =")
        .replace(
            "y = Add(straight, crossed)", "y32 = Add(straight, crossed)\n y = Cast<to=10>(y32)"
        )
    )
    model = rotary(model_of, body, x="float16[b,2,t,6] x", y="float16[b,2,t,6] y")
    data = feeds(dtype=np.float16)
    before = evaluate(model, data)["y"]
    assert FuseRotary()(model).modified
    assert ops(model)["Cast"] == 3
    np.testing.assert_allclose(evaluate(model, data)["y"], before, rtol=1e-3, atol=1e-3)


def test_half_precision_with_cast_angles(model_of, evaluate, ops):
    angles = ANGLES.replace(
        "cos = Unsqueeze(c, one)\nsin = Unsqueeze(s, one)",
        "ch = Cast<to=10>(c)\n sh = Cast<to=10>(s)\n"
        "cos = Unsqueeze(ch, one)\n sin = Unsqueeze(sh, one)",
    )
    model = rotary(
        model_of, ROTATION, angles=angles, x="float16[b,2,t,6] x", y="float16[b,2,t,6] y"
    )
    data = feeds(dtype=np.float16)
    before = evaluate(model, data)["y"]
    assert FuseRotary()(model).modified
    assert ops(model)["RotaryEmbedding"] == 1
    np.testing.assert_allclose(evaluate(model, data)["y"], before, rtol=4e-3, atol=4e-3)


def test_angles_of_all_rotations_are_halved_once(model_of, evaluate, ops):
    second = ROTATION
    for name in ("low", "high", "minus", "turned", "straight", "crossed"):
        second = second.replace(name, f"{name}2")
    second = second.replace("y = ", "z = ").replace("(x,", "(w,")
    model = rotary(
        model_of, ROTATION + second, more=", float[b,2,t,6] w", extra=", float[b,2,t,6] z"
    )
    assert FuseRotary()(model).modified
    assert ops(model) == {
        "Unsqueeze": 1, "Cast": 1, "Mul": 1, "Cos": 1, "Sin": 1, "RotaryEmbedding": 2,
    }  # fmt: skip
    data = feeds() | {"w": RNG.standard_normal((2, 2, 4, 6)).astype(np.float32)}
    np.testing.assert_allclose(evaluate(model, data)["z"], expected(data["w"]), atol=2e-6)


REFUSED = {
    "halves differ": (
        ROTATION,
        {
            "angles": ANGLES.replace("ff = Concat<axis=-1>(f, f)", "ff = Concat<axis=-1>(f, g)"),
            "more": ", float[b,t,3] g",
        },
        "not a value joined with itself",
    ),
    "angles given": (
        ROTATION.replace("Mul(x, cos)", "Mul(x, other)"),
        {"more": ", float[b,1,t,6] other"},
        "comes from no node, not from Unsqueeze",
    ),
    "angles of unknown origin": (
        ROTATION,
        {"angles": ANGLES.replace("cos = Unsqueeze(c,", "r = Abs(c)\n cos = Unsqueeze(r,")},
        "the angles go through Abs",
    ),
    "angles times a variable": (
        ROTATION,
        {
            "angles": ANGLES.replace("cos = Unsqueeze(c,", "r = Mul(c, v)\n cos = Unsqueeze(r,"),
            "more": ", float[6] v",
        },
        "v is not constant",
    ),
    "one row of angles for all": (
        ROTATION,
        {"x": "float[batch,2,t,6] x", "y": "float[batch,2,t,6] y"},
        "the angles' batch is not that of x",
    ),
    "interleaved pairs": (
        ROTATION.replace("zero, half, three, one)", "zero, end, three, two)").replace(
            "half, end, three, one)", "one, end, three, two)"
        ),
        {},
        "a Slice has steps",
    ),
    "sign on the other half": (
        ROTATION.replace("Concat<axis=-1>(minus, low)", "Concat<axis=-1>(low, minus)"),
        {},
        "not from Neg",
    ),
    "halves of two values": (
        ROTATION.replace("high = Slice(x,", "high = Slice(v,"),
        {"more": ", float[b,2,t,6] v"},
        "not of the same value",
    ),
    "cosine of another value": (
        ROTATION.replace("Mul(x, cos)", "Mul(v, cos)"),
        {"more": ", float[b,2,t,6] v"},
        "something else than what is rotated",
    ),
    "uneven halves": (
        ROTATION.replace("zero, half", "zero, two").replace("half, end", "two, end"),
        {},
        "not the first half",
    ),
    "upper half begins early": (
        "five = Constant<value_ints=[5]>()\n" + ROTATION.replace("half, end", "two, five"),
        {},
        "not the second half",
    ),
    "product used elsewhere": (
        ROTATION + "z = Neg(crossed)",
        {"extra": ", float[b,2,t,6] z"},
        "crossed is used elsewhere",
    ),
    "no rotation": ("a = Mul(x, cos)\n b = Neg(x)\n y = Add(a, b)", {}, "not from Mul"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_rotation_is_left_alone(model_of, ops, caplog, case):
    body, arguments, reason = REFUSED[case]
    model = rotary(model_of, body, **arguments)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not FuseRotary()(model).modified
    assert ops(model) == before
    assert reason in caplog.text
