import numpy as np
import onnx_ir as ir
import pytest

from echoatt_exporter.graph.lowering.pack_projections import PackProjections
from echoatt_exporter.graph.roles import Kind, Part, Use, role_of, set_role

RNG = np.random.default_rng(19)
X = {"x": RNG.standard_normal((2, 3, 16)).astype(np.float32)}
WEIGHTS = {
    name: RNG.standard_normal(shape).astype(np.float32)
    for name, shape in {
        "wq": (16, 8), "wk": (16, 4), "wv": (16, 4), "bq": (8,), "bk": (4,), "bv": (4,),
    }.items()
}  # fmt: skip
PLAIN = "q = MatMul(x, wq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)\n"
BIASED = (
    "q0 = MatMul(x, wq)\n q = Add(q0, bq)\n k0 = MatMul(x, wk)\n k = Add(bk, k0)\n"
    "v0 = MatMul(x, wv)\n v = Add(v0, bv)\n"
)


def projections(model_of, body, outputs="float[b,s,8] q, float[b,s,4] k, float[b,s,4] v"):
    declared = ", ".join(
        f"float[{','.join(map(str, array.shape))}] {name}"
        for name, array in WEIGHTS.items()
        if name in body
    )
    weights = {name: array for name, array in WEIGHTS.items() if name in body}
    return model_of(f"g (float[b,s,16] x, {declared}) => ({outputs}) {{ {body} }}", weights)


def test_projections_of_one_input_become_one_product(model_of, evaluate, ops, difference):
    model = projections(model_of, PLAIN)
    before = evaluate(model, X)
    assert PackProjections()(model).modified
    assert ops(model) == {"MatMul": 1, "Split": 1}
    product, split = model.graph
    np.testing.assert_array_equal(
        product.inputs[1].const_value.numpy(),
        np.concatenate([WEIGHTS[name] for name in ("wq", "wk", "wv")], axis=1),
    )
    assert split.inputs[1].const_value.numpy().tolist() == [8, 4, 4]
    assert product.outputs[0].shape == ["b", "s", 16]
    assert difference(before, evaluate(model, X)) < 1e-5
    assert not PackProjections()(model).modified


def test_biases_are_packed_where_all_have_one(model_of, evaluate, ops, difference):
    model = projections(model_of, BIASED)
    before = evaluate(model, X)
    assert PackProjections()(model).modified
    assert ops(model) == {"MatMul": 1, "Add": 1, "Split": 1}
    assert {name for name in model.graph.initializers if name in WEIGHTS} == set()
    assert difference(before, evaluate(model, X)) < 1e-5


def test_biases_stay_behind_the_split_where_some_have_none(model_of, evaluate, ops, difference):
    model = projections(model_of, BIASED.replace("k0 = ", "k = ").replace("k = Add(bk, k0)\n", ""))
    before = evaluate(model, X)
    assert PackProjections()(model).modified
    assert ops(model) == {"MatMul": 1, "Add": 2, "Split": 1}
    assert difference(before, evaluate(model, X)) < 1e-5


def test_a_residual_addition_is_no_bias(model_of, evaluate, ops, difference):
    body = "q = MatMul(x, wq)\n k0 = MatMul(x, wk)\n k = Add(k0, v)\n v = MatMul(x, wv)\n"
    lines = body.split("\n")
    model = projections(model_of, "\n".join([lines[0], lines[3], lines[1], lines[2]]))
    before = evaluate(model, X)
    assert PackProjections()(model).modified
    assert ops(model) == {"MatMul": 1, "Add": 1, "Split": 1}
    assert difference(before, evaluate(model, X)) < 1e-5


def test_a_vector_that_varies_is_no_bias(model_of, evaluate, ops, difference):
    model = model_of(
        "g (float[b,s,16] x, float[16,4] wk, float[16,4] wv, float[4] bk, float[4] given)\n"
        "=> (float[b,s,4] k, float[b,s,4] v) {\n"
        "k0 = MatMul(x, wk)\n k = Add(k0, bk)\n v0 = MatMul(x, wv)\n v = Add(v0, given) }",
        {name: WEIGHTS[name] for name in ("wk", "wv", "bk")},
    )
    feeds = X | {"given": np.arange(4, dtype=np.float32)}
    before = evaluate(model, feeds)
    assert PackProjections()(model).modified
    assert ops(model) == {"MatMul": 1, "Add": 2, "Split": 1}
    assert difference(before, evaluate(model, feeds)) < 1e-5


def test_the_weight_is_not_put_together_before_it_is_needed(model_of):
    model = projections(model_of, PLAIN)
    reads = []

    class Counted(ir.Tensor):
        def numpy(self):
            reads.append(self.name)
            return super().numpy()

    for name in ("wq", "wk", "wv"):
        model.graph.initializers[name].const_value = Counted(WEIGHTS[name], name=name)
    PackProjections()(model)
    assert reads == []
    packed = next(node for node in model.graph if node.op_type == "MatMul").inputs[1].const_value
    assert isinstance(packed, ir.LazyTensor)
    assert packed.nbytes == 16 * 16 * 4
    assert reads == []
    packed.numpy()
    assert reads == ["wq", "wk", "wv"]


def test_projections_of_a_graph_output_keep_their_names(model_of, evaluate):
    model = projections(model_of, PLAIN)
    PackProjections()(model)
    assert [output.name for output in model.graph.outputs] == ["q", "k", "v"]


def test_packed_weights_have_the_names_and_the_roles_of_their_parts_in_order(model_of):
    model = projections(model_of, PLAIN)
    uses = {}
    for name, kind, columns in (("q", Kind.QUERIES, 8), ("k", Kind.KEYS, 4), ("v", Kind.VALUES, 4)):
        weight = model.graph.initializers[f"w{name}"]
        weight.name = f"layers.0.self_attn.{name}_proj.weight"
        uses[name] = Part(frozenset({Use(kind, 0)}), columns)
        set_role(weight, [uses[name]])
    PackProjections()(model)
    packed = model.graph.initializers["layers.0.self_attn.q_proj+k_proj+v_proj.weight"]
    assert role_of(packed) == (uses["q"], uses["k"], uses["v"])


def test_a_part_whose_role_is_not_known_stays_unknown(model_of):
    model = projections(model_of, PLAIN)
    set_role(model.graph.initializers["wq"], [Part(frozenset({Use(Kind.QUERIES, 0)}), 8)])
    PackProjections()(model)
    queries, others = role_of(model.graph.initializers["wq+wk+wv"])
    assert (queries.columns, others) == (8, Part(frozenset(), 8))


REFUSED = {
    "one projection": ("q = MatMul(x, wq)\n", "float[b,s,8] q", "no other"),
    "different inputs": (
        "y = Neg(x)\n q = MatMul(x, wq)\n k = MatMul(y, wk)\n",
        "float[b,s,8] q, float[b,s,4] k",
        "no other",
    ),
    "a shared weight": (
        "q = MatMul(x, wq)\n k = MatMul(x, wk)\n r = Relu(wk)\n",
        "float[b,s,8] q, float[b,s,4] k, float[16,4] r",
        "wk is used elsewhere",
    ),
    "two activations": (
        "t = Transpose<perm=[0,2,1]>(x)\n q = MatMul(x, t)\n r = MatMul(x, wk)\n",
        "float[b,s,s] q, float[b,s,4] r",
        "t is not a weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_is_left_alone(model_of, ops, caplog, case):
    body, outputs, reason = REFUSED[case]
    model = projections(model_of, body, outputs)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not PackProjections()(model).modified
    assert ops(model) == before
    assert reason in caplog.text
