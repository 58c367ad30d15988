"""The similarity of layers and heads, against numbers worked out by hand and in plain numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import VOCAB_SIZE
from transformers import PreTrainedModel

from echoatt_exporter.analyze import compare_maps
from echoatt_exporter.analyze.compare_maps import measure_similarity
from echoatt_exporter.analyze.similarity import (
    METRICS,
    HeadSimilarity,
    LayerSimilarity,
)
from echoatt_exporter.errors import AnalysisError

# More tokens than rows are multiplied at a time, and not a multiple
WINDOWS = torch.randint(3, VOCAB_SIZE, (3, 45), generator=torch.Generator().manual_seed(5))


def measure(
    teacher: Any, windows: torch.Tensor = WINDOWS, **options: Any
) -> tuple[LayerSimilarity, HeadSimilarity]:
    record: dict[str, Any] = {"text_digest": "t", "checkpoint_digest": "c", "model": "m", "seed": 9}
    return measure_similarity(teacher, windows, **record, **options)


def flat_cosine(a: Any, b: Any) -> float:
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def without_first(maps: Any) -> Any:
    rest = np.array(maps, dtype=np.float64)[..., 1:, 1:]
    return rest / rest.sum(axis=-1, keepdims=True)


def assert_near(actual: Any, expected: Any) -> None:
    """As near as float32 products of a few thousand numbers come."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_figures_equal_numbers_worked_out_by_hand(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = torch.tensor(
        [
            [
                [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.4, 0.4]],
                [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            ],
            [
                [[1, 0, 0], [1, 0, 0], [0.6, 0.1, 0.3]],  # the second row has no rest
                [[1, 0, 0], [0, 1, 0], [0, 1, 0]],
            ],
        ]
    )
    monkeypatch.setattr(compare_maps, "attention_maps", lambda teacher, window: maps)
    layers, heads = measure(tiny_model("llama"), WINDOWS[:1])
    # First heads: 1 + 0.5 + 0.12 + 0.04 + 0.12 = 1.78, squares 1.86 and 2.46; second 2, 3 and 3
    assert layers.mean[0, 1] == pytest.approx(3.78 / np.sqrt(4.86 * 5.46), abs=1e-7)
    # Rows [1 0] [.5 .5] by [0 0] [.25 .75], then [1 0] [0 1] by [1 0] [1 0]
    assert layers.mean_without_first[0, 1] == pytest.approx(1.5 / np.sqrt(3.5 * 2.625), abs=1e-7)
    assert layers.head_mean[0, 1].tolist() == pytest.approx(
        [1.78 / np.sqrt(1.86 * 2.46), 2 / 3], abs=1e-7
    )
    # First head of layer 0 by the second of layer 1: 1 + 0.5 + 0.4
    assert heads.head_pairs[0, 0, 1, 1] == pytest.approx(1.9 / np.sqrt(1.86 * 3), abs=1e-7)
    assert layers.std.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_figures_equal_plain_numpy_over_samples(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    teacher = tiny_model(family)
    seen: list[int] = []
    layers, heads = measure(teacher, on_sample=seen.append)
    assert seen == [1, 2, 3]
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        samples = [
            torch.cat(teacher(window[None], output_attentions=True).attentions).numpy()
            for window in WINDOWS
        ]
    every = range(6)
    raw = np.array(
        [[[flat_cosine(maps[i], maps[j]) for j in every] for i in every] for maps in samples]
    )
    rest = np.array(
        [
            [[flat_cosine(maps[i], maps[j]) for j in every] for i in every]
            for maps in map(without_first, samples)
        ]
    )
    pairs = np.array(
        [
            [[flat_cosine(maps[2, h], maps[4, g]) for g in range(4)] for h in range(4)]
            for maps in samples
        ]
    )
    assert_near(layers.mean, raw.mean(axis=0))
    assert_near(layers.std, raw.std(axis=0, ddof=1))
    assert_near(layers.mean_without_first, rest.mean(axis=0))
    assert_near(layers.std_without_first, rest.std(axis=0, ddof=1))
    assert_near(heads.head_pairs[2, :, 4, :], pairs.mean(axis=0))
    assert_near(layers.head_mean[2, 4], pairs.mean(axis=0).diagonal())
    # Both variants must differ, and samples must, or the lines above say little
    assert np.abs(layers.mean - layers.mean_without_first).max() > 0.01
    assert layers.std.max() > 0.001


def test_layers_that_attend_alike_have_similarity_one(tiny_model: Callable[..., Any]) -> None:
    teacher = tiny_model("llama")
    with torch.no_grad():
        for layer in teacher.model.layers:  # no layer changes what the next one reads
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        teacher.model.layers[4].load_state_dict(teacher.model.layers[1].state_dict())
    layers, _ = measure(teacher)
    for mean in (layers.mean, layers.mean_without_first):
        assert mean[1, 4] == pytest.approx(1, abs=1e-6)
        assert np.diagonal(mean).tolist() == pytest.approx([1] * 6, abs=1e-6)
        assert (mean <= 1).all()
        assert mean[1, 3] < 0.99


def test_same_windows_give_the_same_bits_and_a_file_keeps_them(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    layers, heads = measure(tiny_model("qwen3"))
    again, heads_again = measure(tiny_model("qwen3"))
    assert again.to_json() == layers.to_json()
    assert heads_again.head_pairs.tobytes() == heads.head_pairs.tobytes()
    path = tmp_path / "similarity.json"
    path.write_text("an older one", encoding="utf-8")
    layers.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["similarity.json"]
    read = LayerSimilarity.load(path)
    assert read.to_json() == layers.to_json()
    for name in METRICS:
        np.testing.assert_array_equal(getattr(read, name), getattr(layers, name))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["schema"] == "echoatt-similarity/1"
    assert (data["samples"], data["length"], data["seed"]) == (3, 45, 9)
    assert (data["model"], data["family"]) == ("m", "qwen3")
    assert (data["text_digest"], data["checkpoint_digest"]) == ("t", "c")
    assert set(data["versions"]) == {"echoatt", "torch", "transformers"}
    assert set(data["metrics"]) == set(METRICS)


def test_a_file_that_cannot_be_written_is_an_error_and_loses_nothing(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, _ = measure(tiny_model("llama"), WINDOWS[:1, :4])
    with pytest.raises(AnalysisError, match="cannot write"):
        layers.save(tmp_path / "absent" / "similarity.json")
    path = tmp_path / "similarity.json"
    path.write_text("an older one", encoding="utf-8")

    def fill_the_disk(file: Path, data: bytes) -> None:
        file.write_text(data[:10].decode(), encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(AnalysisError, match="No space left"):
        layers.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["similarity.json"]
    assert path.read_text(encoding="utf-8") == "an older one"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("{", "not JSON"),
        ("[]", '"schema" is None, expected "echoatt-similarity/1"'),
        ({"schema": "echoatt-similarity/2"}, "\"schema\" is 'echoatt-similarity/2'"),
        ({"mean": None}, '"mean" is no array of numbers'),
        ({"std": [[0.0, 1.0], [0.0]]}, '"std" is no array of numbers'),
        ({"std": [[float("nan")]]}, '"std" is no array of numbers'),
        ({"mean": [[1.0]]}, '"mean_without_first" has the shape'),
        ({"head_mean": [[1.0]]}, r'"head_mean" has the shape \(1, 1\)'),
        ({"samples": "3", "seed": None}, '"samples" is \'3\'; "seed" is None'),
    ],
)
def test_bad_file_is_one_line_that_names_it(
    damage: str | dict[str, Any],
    words: str,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    path = tmp_path / "similarity.json"
    if isinstance(damage, dict):
        layers, _ = measure(tiny_model("llama"), WINDOWS[:1, :4])
        damage = json.dumps(json.loads(layers.to_json()) | damage)
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(AnalysisError, match=words) as caught:
        LayerSimilarity.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="cannot read the similarity"):
        LayerSimilarity.load(tmp_path / "similarity.json")


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_windows_that_cannot_be_compared_are_refused(
    shape: tuple[int, ...], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(AnalysisError, match="cannot be compared"):
        measure(tiny_model("llama"), torch.full(shape, 3))


def test_attention_that_is_no_number_names_the_sample(tiny_model: Callable[..., Any]) -> None:
    teacher = tiny_model("llama")
    windows = torch.tensor([[3, 4, 5], [3, 6, 5]])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[6] = float("nan")
    with pytest.raises(AnalysisError, match="attention on sample 2 is not a number"):
        measure(teacher, windows)


def test_trained_checkpoint(stories260k: Path) -> None:
    from echoatt_exporter.share.checkpoint import load_teacher

    windows = torch.randint(3, 512, (2, 96), generator=torch.Generator().manual_seed(1))
    layers, heads = measure(load_teacher(stories260k), windows)
    assert layers.head_mean.shape == (5, 5, 8)
    assert heads.head_pairs.shape == (5, 8, 5, 8)
    assert layers.mean.min() > 0
