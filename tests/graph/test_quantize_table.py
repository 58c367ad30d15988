"""V vocabulary, E hidden size."""

import numpy as np
import pytest
from tests.quantisation import to_nearest
from tests.wording import says

from echoatt_exporter.graph import GraphSize
from echoatt_exporter.graph.canonical.assign_roles import AssignRoles
from echoatt_exporter.graph.lowering.quantize_table import QuantizeTable
from echoatt_exporter.graph.roles import Kind, role_of
from echoatt_exporter.graph.same_bytes import SameBytes

V, E = 40, 64
RNG = np.random.default_rng(3)
TABLE = RNG.standard_normal((V, E)).astype(np.float32)


def decoder_of(model_of, table, head, extra="", outputs=""):
    """Looks tokens up and multiplies what it found by a head."""
    model = model_of(
        f"g (int64[b,s] input_ids, float[{V},{table.shape[1]}] table,"
        f" float[{table.shape[1]},{head.shape[1]}] head) =>"
        f" (float[b,s,{head.shape[1]}] logits{outputs})\n"
        f"{{ x = Gather(table, input_ids)\n logits = MatMul(x, head)\n {extra} }}",
        {"table": table, "head": head},
    )
    AssignRoles().call(model)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_that_is_the_table_reads_its_bytes(model_of, evaluate, ops, bits):
    model = decoder_of(model_of, TABLE, TABLE.T.copy())
    ids = {"input_ids": np.array([[3, 39, 0]])}
    expected = evaluate(model, ids)["logits"]
    parameters = GraphSize.of(model).parameters

    assert QuantizeTable(to_nearest(bits)).call(model).modified

    assert ops(model) == {"GatherBlockQuantized": 1, "MatMulNBits": 1}
    bytes_of_row = E * bits // 8
    size = GraphSize.of(model)
    assert size.bytes == V * (bytes_of_row + E // 32 * 4)
    # Counted once, and before there were two
    assert size.parameters == parameters / 2 == V * E
    lookup, product = model.graph
    assert lookup.inputs[0].shape == [V, bytes_of_row]
    assert product.inputs[1].shape == [V, E // 32, 32 * bits // 8]
    assert lookup.inputs[2] is product.inputs[2]
    assert isinstance(lookup.inputs[0].const_value, SameBytes)
    kinds = {use.kind for part in role_of(product.inputs[1]) for use in part.uses}
    assert kinds == {Kind.EMBEDDING, Kind.HEAD}
    lost = np.linalg.norm(evaluate(model, ids)["logits"] - expected) / np.linalg.norm(expected)
    assert lost < (0.2 if bits == 4 else 0.02)


def test_a_table_apart_is_quantised_by_itself(model_of, evaluate, ops):
    head = RNG.standard_normal((E, V)).astype(np.float32)
    model = decoder_of(model_of, TABLE, head, outputs=f", float[b,s,{E}] x")
    assert QuantizeTable(to_nearest(8)).call(model).modified
    assert ops(model) == {"GatherBlockQuantized": 1, "MatMul": 1}
    assert GraphSize.of(model).parameters == 2 * V * E
    found = evaluate(model, {"input_ids": np.array([[5, 1]])})["x"]
    step = np.abs(TABLE).reshape(V, -1, 32).max(-1).repeat(32, 1) / 127
    assert np.all(np.abs(found[0] - TABLE[[5, 1]]) <= step[[5, 1]])


def test_a_table_that_differs_in_one_element_is_apart(model_of, ops):
    head = TABLE.T.copy()
    head[E - 1, V - 1] += 1e-3
    model = decoder_of(model_of, TABLE, head)
    assert QuantizeTable(to_nearest(4)).call(model).modified
    assert ops(model) == {"GatherBlockQuantized": 1, "MatMul": 1}


@pytest.mark.parametrize(
    ("table", "extra", "outputs", "reason"),
    [
        (TABLE[:, :40], "", "", "rows of 40 are not whole blocks of 32"),
        (TABLE, "z = Identity(table)", f", float[{V},{E}] z", "table is used elsewhere too"),
        (TABLE.astype(np.float64), "", "", "table is DOUBLE"),
    ],
)
def test_other_tables_stay(model_of, ops, caplog, table, extra, outputs, reason):
    text = "double" if table.dtype == np.float64 else "float"
    model = model_of(
        f"g (int64[b,s] input_ids, {text}[{V},{table.shape[1]}] table) =>"
        f" ({text}[b,s,{table.shape[1]}] x{outputs}) {{ x = Gather(table, input_ids)\n {extra} }}",
        {"table": table},
    )
    AssignRoles().call(model)
    before = ops(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not QuantizeTable(to_nearest(4)).call(model).modified
    assert ops(model) == before
    assert says(caplog.text, reason)


def test_a_table_of_positions_stays(model_of, ops, caplog):
    model = model_of(
        f"g (int64[b,s] positions, float[{V},{E}] table) => (float[b,s,{E}] x)\n"
        "{ x = Gather(table, positions) }",
        {"table": TABLE},
    )
    AssignRoles().call(model)
    with caplog.at_level("DEBUG", "echoatt_exporter"):
        assert not QuantizeTable(to_nearest(4)).call(model).modified
    assert says(caplog.text, "table holds no embeddings")
