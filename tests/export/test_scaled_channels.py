"""An int8 bundle of a model whose activations have outliers, on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echoatt_exporter import (
    ExportReport,
    ParityError,
    RoundingChoice,
    check_parity,
    export_bundle,
)
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_runtime import EchoModel
from echoatt_runtime.contract import SharingPlan

SHAPE = {
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 256,
}
PLAN = "2:1"
TOKENS = list(range(5, 45))


@torch.no_grad()
def _plant_outliers(model: Any) -> None:
    """Make every 32nd channel 64 times as large, and the weights that read it that much smaller."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        )
        for producer, consumers in readers:
            producer.weight[::32] *= 64
            for consumer in consumers:
                consumer.weight[:, ::32] /= 64


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("llama", **SHAPE)
    _plant_outliers(model)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scaled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    path = tmp_path_factory.mktemp("int8") / "tiny.onnx"
    return export_bundle(checkpoint, path, PLAN, dtype="int8", verify=False)


@torch.no_grad()
def test_outliers_cost_an_int8_bundle_little(
    scaled: ExportReport, checkpoint: Path, tmp_path: Path
) -> None:
    rounding = RoundingChoice(rounding="nearest")
    nearest = export_bundle(
        checkpoint, tmp_path / "tiny.onnx", PLAN, dtype="int8", rounding=rounding, verify=False
    )
    quantisation = scaled.manifest.specification.quantisation
    assert quantisation is not None
    assert quantisation.scaled_channels
    student = load_shared(checkpoint, SharingPlan.from_pairs(PLAN, 3), dtype=torch.float32)
    exact = student(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    found, without = (
        np.std(EchoModel.load(report.model).logits(TOKENS) - exact) / np.std(exact)
        for report in (scaled, nearest)
    )
    assert found < 0.2 * without


def test_parity_finds_the_factors_again(scaled: ExportReport, checkpoint: Path) -> None:
    assert check_parity(checkpoint, scaled.model, PLAN, max_context=40).passed


def test_factors_do_not_explain_another_checkpoint(
    scaled: ExportReport, tiny_model: Any, tmp_path: Path
) -> None:
    other = tiny_model("llama", seed=9, **SHAPE)
    _plant_outliers(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ParityError, match="away from the checkpoint's"):
        check_parity(tmp_path, scaled.model, PLAN, max_context=40)
