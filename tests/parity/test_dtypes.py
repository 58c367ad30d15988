"""Bundles of every dtype, on the CPU provider."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tests.parity import mutants
from tests.quantisation import to_nearest

from echoatt_exporter.graph import export_pipeline, run_pipeline
from echoatt_exporter.graph.canonical.assign_roles import AssignRoles
from echoatt_exporter.graph.lowering.quantize_table import QuantizeTable
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.parity import compare, record_reference, record_unrounded
from echoatt_exporter.parity.precision import Precision
from echoatt_exporter.quantise.block_quantizer import (
    BLOCK_SIZE,
    dequantize_blocks,
    quantize_blocks,
)
from echoatt_exporter.quantise.round_weights import round_to_nearest
from echoatt_exporter.share.apply import share_attention
from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import DamagedBundleError


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: Any, sliding: Any) -> Any:
    """The sliding-window model as an int8 and int4 bundle's manifest and reference."""
    bits: Literal[4, 8] = 8 if request.param == "int8" else 4
    specification = dataclasses.replace(
        sliding.specification,
        dtype=request.param,
        quantisation=to_nearest(bits),
    )
    student = copy.deepcopy(sliding.student)
    unrounded = record_unrounded(student, specification, tokenizer_dir=None)
    round_to_nearest(student, specification.quantisation, lambda _done, _total: None)
    reference = record_reference(student, specification, tokenizer_dir=None, unrounded=unrounded)
    return dataclasses.replace(sliding, specification=specification, reference=reference)


def _quantise(model: ir.Model, specification: Specification) -> ir.Model:
    assert specification.quantisation is not None
    AssignRoles().call(model)
    assert QuantizeTable(specification.quantisation).call(model).modified
    assert QuantizeWeights(specification.quantisation).call(model).modified
    return model


def test_a_quantised_bundle_is_judged_by_its_rounded_weights(quantised: Any, write: Any) -> None:
    model = _quantise(ir.load(quantised.graph_file), quantised.specification)

    report = compare(quantised.reference, write(model, quantised.specification))

    assert report.passed, report.to_dict()
    assert all(case.name.endswith(", rounded weights") for case in report.cases)
    assert report.tolerance.name == "fp32"
    # What quantisation changes is told, and judges nothing
    assert report.unrounded is not None
    assert report.unrounded.name == "prompts, unrounded weights"
    assert report.unrounded.rows == 26 + 19 + 36
    assert report.unrounded.mean_kl > 1e4 * max(case.mean_kl for case in report.cases)


def test_a_fault_smaller_than_what_rounding_costs_fails(quantised: Any, write: Any) -> None:
    model = ir.load(quantised.graph_file)
    mutants.scale_weight(model, "model.layers.2.self_attn.v_proj.weight", 1.001)

    report = compare(
        quantised.reference,
        write(_quantise(model, quantised.specification), quantised.specification),
    )

    assert not any(case.passed for case in report.cases)
    assert report.unrounded is not None
    assert report.worst.rms_error < report.unrounded.rms_error
    assert report.first_diverging_layer == 2


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

    expected_NK = dequantize_blocks(quantize_blocks(weight_NK.T, bits, block), bits)[:, :inputs]
    np.testing.assert_allclose(found_KN.T, expected_NK, atol=1e-6)
    assert np.abs(expected_NK - weight_NK).max() > 1e-3


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request: Any, export: Any) -> Any:
    """Gemma 2 in 16 bits: scaled embeddings, soft-caps, two kinds of layers."""
    return export("gemma2", (0, 1, 0), request.param, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention",
    ])  # fmt: skip


def _lowered(half: Any) -> ir.Model:
    """The graph as it is for CUDA."""
    model = ir.load(half.graph_file)
    run_pipeline(model, export_pipeline(half.specification))
    return model


def test_a_16_bit_bundle_passes_on_the_cpu(half: Any, write: Any) -> None:
    report = compare(half.reference, write(_lowered(half), half.specification))

    assert report.passed, report.to_dict()
    if half.specification.dtype == "bf16":
        # The CPU has no bf16 kernels
        assert report.provider == "CPUExecutionProvider, computed in float32"
        assert report.tolerance.name == "bf16 computed in float32"
    else:
        assert report.provider == "CPUExecutionProvider"
        assert report.tolerance.name == "fp16"
    assert report.verification().provider == report.provider


def test_a_fault_in_a_16_bit_bundle_fails(half: Any, write: Any) -> None:
    model = _lowered(half)
    mutants.swap_probability_heads(model, 2)

    report = compare(half.reference, write(model, half.specification))

    assert not report.passed
    assert report.first_diverging_layer == 2


def test_a_16_bit_bundle_without_its_weights_is_damaged(half: Any, write: Any) -> None:
    bundle = write(_lowered(half), half.specification)
    bundle.weights.unlink()

    with pytest.raises(DamagedBundleError):
        compare(half.reference, bundle)


def test_float64_is_rounded_nowhere_and_other_numbers_are_left_alone() -> None:
    wide, narrow = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2)
    with Precision(torch.float64):
        for kept in (
            wide.float(),
            wide.to(torch.float32),
            wide.type(torch.float16),
            torch.softmax(wide, -1, dtype=torch.float32),
            wide @ narrow,
        ):
            assert kept.dtype == torch.float64
        assert (narrow @ narrow).dtype == torch.float32
        assert wide.long().float().dtype == torch.float32


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("own", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_a_module_computes_in_a_wider_precision_than_its_weights(
    tiny_model: Any, plan_for: Any, family: str, own: torch.dtype, halves: bool
) -> None:
    student = share_attention(tiny_model(family).to(own), plan_for(family))
    before = {name: (id(p), p.dtype) for name, p in student.named_parameters()}
    tokens = torch.arange(12)[None]
    with torch.inference_mode(), Precision(torch.float64, halves=halves):
        found = student(tokens).logits
    with torch.inference_mode(), Precision(torch.float32):
        narrow = student(tokens).logits
    after = {name: (id(p), p.dtype) for name, p in student.named_parameters()}

    with torch.inference_mode(), Precision(torch.float64):
        for module in student.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(parameter.double())
        expected = student(tokens).logits
    assert found.dtype == torch.float64
    # Another order of float64's sums, and no rounding to float32 anywhere
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert narrow.dtype == torch.float32
    distance = (narrow - expected).abs().max() / expected.std()
    assert 1e-8 < distance < 1e-4
    assert after == before
