"""ShareTiedTable: an LM head tied to the embedding reads its table; a look-alike keeps its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from echoatt_exporter.graph.lowering.share_tied_table import ShareTiedTable
from echoatt_exporter.graph.roles import Kind, Part, Use, role_of, set_role

V, E = 11, 4
TABLE = np.random.default_rng(0).standard_normal((V, E)).astype(np.float32)


def _model(head: np.ndarray, head_uses: int = 1) -> ir.Model:
    text = f"""
    <ir_version: 10, opset_import: ["" : 24]>
    tiny (int64[batch, seq] ids) => (float[batch, seq, {V}] logits) {{
      hidden = Gather(table, ids)
      {
        "logits = MatMul(hidden, head)"
        if head_uses == 1
        else "first = MatMul(hidden, head) other = MatMul(hidden, head) logits = Add(first, other)"
    }
    }}
    """
    model = onnx.parser.parse_model(text)
    for name, array in (("table", TABLE), ("head", head)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(model)


def _run(model: ir.Model) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    logits: np.ndarray = session.run(None, {"ids": np.array([[1, 2, 10], [0, 5, 5]])})[0]
    return logits


def test_tied_head_reads_the_table_and_gives_the_same_logits() -> None:
    model = _model(np.ascontiguousarray(TABLE.T))
    before = _run(model)
    for name, kind in (("table", Kind.EMBEDDING), ("head", Kind.HEAD)):
        set_role(model.graph.initializers[name], [Part(frozenset({Use(kind)}), V)])
    assert ShareTiedTable()(model).modified
    both = frozenset({Use(Kind.EMBEDDING), Use(Kind.HEAD)})
    assert role_of(model.graph.initializers["table"]) == (Part(both, V),)
    assert [node.op_type for node in model.graph].count("MatMul") == 0
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    assert gemm.inputs[1] is model.graph.initializers["table"]
    assert "head" not in model.graph.initializers
    assert [value.name for value in model.graph.outputs] == ["logits"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(_run(model), before, atol=1e-6, rtol=0)
    assert not ShareTiedTable()(model).modified


@pytest.mark.parametrize("row", [0, V - 1])
def test_head_that_differs_in_one_element_keeps_its_weight(row: int) -> None:
    head = np.ascontiguousarray(TABLE.T)
    head[0, row] += 1e-6
    model = _model(head)
    assert not ShareTiedTable()(model).modified
    assert "head" in model.graph.initializers


def test_weight_with_two_readers_stays() -> None:
    model = _model(np.ascontiguousarray(TABLE.T), head_uses=2)
    assert not ShareTiedTable()(model).modified


def test_half_precision_is_shared_too() -> None:
    model = _model(np.ascontiguousarray(TABLE.T))
    for name in ("table", "head"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        half = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)
        value.const_value, value.type = half, ir.TensorType(ir.DataType.FLOAT16)
    assert ShareTiedTable()(model).modified
