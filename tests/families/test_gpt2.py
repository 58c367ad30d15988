"""What only GPT-2 has: a table of positions that ends, scales by layer, cross-attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import build_tiny_model
from transformers import GPT2Config

from echoatt_exporter import export_bundle, load_teacher
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with different scales; layer 1 follows layer 0; weights of 8 bits."""
    directory = tmp_path_factory.mktemp("gpt2")
    build_tiny_model(
        "gpt2", num_hidden_layers=2, scale_attn_by_inverse_layer_idx=True
    ).save_pretrained(directory / "checkpoint")
    for plan, out in ((None, "unshared.onnx"), ("1:0", "shared.onnx")):
        report = export_bundle(directory / "checkpoint", directory / out, plan, dtype="int8")
        assert report.parity is not None
        assert report.parity.passed
    return directory / "shared.onnx"


def test_a_rows_padding_may_lie_behind_the_last_position(bundle: Path) -> None:
    """The table has 64 rows; the row is at 60, has 4 more tokens, and 12 of padding."""
    session = onnxruntime.InferenceSession(bundle, providers=["CPUExecutionProvider"])
    random, sizes = np.random.default_rng(1), {"batch": 1, "capacity": 96}
    caches = {
        value.name: random.normal(size=[sizes.get(dim, dim) for dim in value.shape])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }

    def logits(padding: int) -> np.ndarray:
        tokens = np.array([[5, 6, 7, 8] + [0] * padding])
        feeds = {
            "input_ids": tokens,
            "past_lengths": np.array([60]),
            "logits_indices": np.arange(4)[None],
        } | {name: cache.astype(np.float32) for name, cache in caches.items()}
        found: np.ndarray = session.run(["logits"], feeds)[0]
        return found

    np.testing.assert_allclose(logits(padding=12), logits(padding=0), atol=1e-4)


def test_a_checkpoint_may_have_old_names_and_causal_masks(tmp_path: Path) -> None:
    """As the first ones were published: no prefix, and each layer's mask among the weights."""
    teacher = build_tiny_model("gpt2")
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(6)}
    save_file(tensors | masks, file, {"format": "pt"})
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        found, expected = load_teacher(tmp_path)(tokens).logits, teacher(tokens).logits
    assert torch.equal(found, expected)


def test_cross_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="a GPT-2 with cross-attention"):
        architecture_of(GPT2Config(add_cross_attention=True))
