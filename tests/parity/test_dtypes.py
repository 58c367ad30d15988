"""Bundles of every dtype, on the CPU provider."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tests.parity import mutants
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.parity import compare, record_reference
from echoatt_exporter.parity.arithmetic import (
    float32_arithmetic,
    quantised_weights,
    round_trip,
)
from echoatt_exporter.quantise.block_quantizer import BLOCK_SIZE, quantize_blocks
from echoatt_exporter.share.apply import share_attention
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import DamagedBundleError

ROUNDED = ["ragged batch, rounded weights", "rows that join and leave, rounded weights"]


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: Any, sliding: Any) -> Any:
    """The sliding-window model as an int8 and int4 bundle's manifest and reference."""
    specification = dataclasses.replace(sliding.specification, dtype=request.param)
    return dataclasses.replace(
        sliding,
        specification=specification,
        reference=record_reference(sliding.student, specification, tokenizer_dir=None),
    )


def _quantise(model: ir.Model, dtype: str) -> ir.Model:
    bits: Literal[4, 8] = 8 if dtype == "int8" else 4
    assert QuantizeWeights(bits).call(model).modified
    return model


def test_a_quantised_bundle_passes_both_checks(quantised: Any, write: Any) -> None:
    model = _quantise(ir.load(quantised.graph_file), quantised.specification.dtype)

    report = compare(quantised.reference, write(model, quantised.specification))

    assert report.passed, report.to_dict()
    bounded, rounded = report.cases[:-2], report.cases[-2:]
    assert [case.name for case in rounded] == ROUNDED
    assert {case.tolerance.name for case in rounded} == {"fp32"}
    assert {case.tolerance.name for case in bounded} == {quantised.specification.dtype}
    # What quantisation changes is seen in one and not in the other
    assert min(case.mean_kl for case in bounded) > 1e4 * max(case.mean_kl for case in rounded)


def test_a_fault_too_small_for_the_bound_fails_with_rounded_weights(
    quantised: Any, write: Any
) -> None:
    model = ir.load(quantised.graph_file)
    mutants.scale_weight(model, "model.layers.2.self_attn.v_proj.weight", 1.001)

    report = compare(
        quantised.reference,
        write(_quantise(model, quantised.specification.dtype), quantised.specification),
    )

    assert {case.name for case in report.cases if not case.passed} == set(ROUNDED)
    assert report.first_diverging_layer == 2


def test_weights_that_lost_more_bits_fail_their_bound(sliding: Any, write: Any) -> None:
    specification = dataclasses.replace(sliding.specification, dtype="int8")
    reference = record_reference(sliding.student, specification, tokenizer_dir=None)
    model = ir.load(sliding.graph_file)
    for name, weight in model.graph.initializers.items():
        if name.endswith("proj.weight"):
            assert weight.const_value is not None
            values_NK = np.ascontiguousarray(weight.const_value.numpy().T)
            weight.const_value = ir.Tensor(round_trip(values_NK, 4).T.copy(), name=name)

    report = compare(reference, write(_quantise(model, "int8"), specification))

    assert not any(case.passed for case in report.cases)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 44])
def test_rounded_weights_are_those_that_the_operator_multiplies_by(
    bits: Literal[4, 8], inputs: int
) -> None:
    outputs, block = 5, BLOCK_SIZE
    weight_NK = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)
    packed = quantize_blocks(weight_NK.T, bits, block)
    names = ["q", "s"]
    make = onnx.helper
    node = make.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=1,
    )  # fmt: skip
    graph = make.make_graph(
        [node],
        "one",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [inputs, inputs])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [inputs, outputs])],
        [
            onnx.numpy_helper.from_array(part, name)
            for part, name in zip(packed, names, strict=True)
        ],
    )
    opsets = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    (found_KN,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})

    expected_NK = round_trip(weight_NK, bits)
    np.testing.assert_allclose(found_KN.T, expected_NK, atol=1e-6)
    assert np.abs(expected_NK - weight_NK).max() > 1e-3


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request: Any, export: Any) -> Any:
    """Gemma 2 in 16 bits: scaled embeddings, soft-caps, two kinds of layers."""
    return export("gemma2", (0, 1, 0), request.param, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention",
    ])  # fmt: skip


def test_a_16_bit_bundle_passes_on_the_cpu(half: Any, write: Any) -> None:
    report = compare(half.reference, write(ir.load(half.graph_file), half.specification))

    assert report.passed, report.to_dict()
    if half.specification.dtype == "bf16":
        # The CPU has no bf16 kernels
        assert report.provider == "CPUExecutionProvider, computed in float32"
        assert {tolerance.name for tolerance in report.tolerances} == {"bf16 computed in float32"}
    else:
        assert report.provider == "CPUExecutionProvider"
        assert {tolerance.name for tolerance in report.tolerances} == {"fp16"}
    assert report.verification().provider == report.provider


def test_a_fault_in_a_16_bit_bundle_fails(half: Any, write: Any) -> None:
    model = ir.load(half.graph_file)
    mutants.swap_probability_heads(model, 2)

    report = compare(half.reference, write(model, half.specification))

    assert not report.passed
    assert report.first_diverging_layer == 2


def test_a_16_bit_bundle_without_its_weights_is_damaged(half: Any, write: Any) -> None:
    bundle = write(ir.load(half.graph_file), half.specification)
    bundle.weights.unlink()

    with pytest.raises(DamagedBundleError):
        compare(half.reference, bundle)


@pytest.mark.parametrize("family", ["llama", "granite", "gpt_neox"])
def test_16_bit_weights_compute_in_float32_and_come_back(tiny_model: Any, family: str) -> None:
    student = share_attention(tiny_model(family).half(), SharingPlan((0, 0, 2, 0, 4, 2)))
    before = {name: (id(p), p.dtype) for name, p in student.named_parameters()}
    tokens = torch.arange(12)[None]
    with torch.inference_mode(), float32_arithmetic(student):
        found = student(tokens).logits
    after = {name: (id(p), p.dtype) for name, p in student.named_parameters()}

    for parameter in student.parameters():
        parameter.data = parameter.data.float()
    with torch.inference_mode():
        expected = student(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert after == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_stored_the_other_way_round_is_rounded_alike(bits: Literal[4, 8]) -> None:
    linear, conv1d = torch.nn.Linear(40, 6), Conv1D(6, 40)
    conv1d.weight.data = linear.weight.data.T.clone()
    conv1d.bias = linear.bias
    hidden = torch.randn(3, 40)
    own = conv1d(hidden)
    with torch.inference_mode(), quantised_weights(torch.nn.ModuleList([linear, conv1d]), bits):
        found, expected = conv1d(hidden), linear(hidden)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, own)


def test_weights_come_back_after_a_failure(tiny_model: Any) -> None:
    student = share_attention(tiny_model("llama"), SharingPlan.unshared(6))
    before = {name: id(p) for name, p in student.named_parameters()}
    with pytest.raises(IndexError), quantised_weights(student, 4):
        student(torch.tensor([[10_000]]))
    with pytest.raises(RuntimeError), quantised_weights(student, 4):
        student.decoder.model.layers[0].mlp.up_proj(torch.zeros(1, 3))

    assert {name: id(p) for name, p in student.named_parameters()} == before
