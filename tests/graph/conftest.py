"""Fixtures for the pass tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tests.graph.tiny_decoder import Decoder, model_from_text

ModelOf = Callable[..., ir.Model]
Evaluate = Callable[[ir.Model, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def model_of() -> ModelOf:
    return model_from_text


@pytest.fixture(scope="session")
def evaluate() -> Evaluate:
    """Runs a model with ONNX Runtime's own optimiser off, after `onnx.checker` accepted it."""

    def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # TensorScatter warns at every run that copies, as it must without IO binding
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wanted = {item.name: feeds[item.name] for item in session.get_inputs()}
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(None, wanted), strict=True))

    return run


@pytest.fixture(scope="session")
def ops() -> Callable[[ir.Model], Counter[str]]:
    return lambda model: Counter(node.op_type for node in model.graph)


@pytest.fixture(scope="session")
def difference() -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], float]:
    """Largest absolute difference over all outputs that the second one has."""

    def largest(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
        assert set(right) <= set(left)
        return max(
            float(np.abs(left[name].astype(np.float64) - right[name].astype(np.float64)).max())
            for name in right
        )

    return largest


@pytest.fixture(scope="session")
def decoder() -> type[Decoder]:
    return Decoder
