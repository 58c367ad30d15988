"""Bundles are scored as checkpoints are, and quantised ones diverge by what numpy says."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from echoatt_exporter import CheckpointError, export_bundle, load_model, share_attention
from echoatt_exporter.evaluate.models import (
    BundleModel,
    CheckpointModel,
    WindowBatch,
    open_model,
)
from echoatt_exporter.evaluate.perplexity import compare_documents, score_documents
from echoatt_exporter.share.save import save_student
from echoatt_exporter.texts import Text
from echoatt_runtime.bundle import read_manifest
from echoatt_runtime.contract import METADATA_KEY, SharingPlan
from echoatt_runtime.errors import DamagedBundleError, DeviceError
from echoatt_runtime.executor import Executor, open_executor

Doubles = NDArray[np.float64]

LENGTH, STRIDE = 12, 5
SIZES = (1, 4, 12, 13, 38)
OPTIONS: dict[str, int] = {"length": LENGTH, "stride": STRIDE, "batch_size": 3}


def _documents() -> list[Text]:
    generator = np.random.default_rng(3)
    words = [[f"w{n}" for n in generator.integers(2, 61, size)] for size in SIZES]
    return [Text(str(index), " ".join(row)) for index, row in enumerate(words)]


@pytest.fixture(scope="module")
def places(
    tiny_model: Any, tokenizer_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A teacher and its student with a follower, and the student's bundles."""
    folder = tmp_path_factory.mktemp("models")
    teacher = tiny_model("llama", num_hidden_layers=2)
    teacher.save_pretrained(folder / "teacher")
    tokenizer_of(True).save_pretrained(folder / "teacher")
    student = share_attention(teacher, SharingPlan((0, 0)))
    save_student(student, folder / "student", folder / "teacher")
    made = {name: folder / name for name in ("teacher", "student")}
    for dtype, out in (("fp32", "fp32/any.onnx"), ("int4", "int4")):
        made[dtype] = folder / out
        export_bundle(made["student"], made[dtype], dtype=dtype, verify=False)
    return made


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("name", ["teacher", "student", "fp32"])
def test_logits_are_those_of_every_window_by_itself(
    name: str, chunk: int, places: dict[str, Path]
) -> None:
    windows = [[1, 9], [1, 17, 4, 33, 60, 2, 5, 8, 13], [7], [1, 22, 21, 20, 19]]
    firsts = [0, 3, 0, 4]
    batch = WindowBatch(windows, firsts, chunk)
    found: list[list[torch.Tensor]] = [[] for _ in windows]
    for wanted, logits_RV in zip(
        batch.wanted(), open_model(places[name]).logits(batch), strict=True
    ):
        counts = [len(positions) for positions in wanted]
        assert logits_RV.dtype == torch.float32
        assert not logits_RV.requires_grad
        for rows, part in zip(found, torch.split(logits_RV, counts), strict=True):
            rows.append(part)

    model = load_model(places["teacher" if name == "teacher" else "student"])
    for window, first, rows in zip(windows, firsts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([window])).logits[0, first:]
        torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=2e-5)


def test_fp32_bundle_scores_as_its_checkpoint(places: dict[str, Path]) -> None:
    bundle, checkpoint = open_model(places["fp32"]), open_model(places["student"])
    assert isinstance(bundle, BundleModel)
    assert isinstance(checkpoint, CheckpointModel)

    alone = score_documents(bundle, _documents(), **OPTIONS)
    expected = score_documents(checkpoint, _documents(), **OPTIONS)
    assert (alone.tokens, alone.bytes) == (sum(SIZES), expected.bytes)
    assert alone.token_digest == expected.token_digest
    np.testing.assert_allclose(alone.nats, expected.nats, rtol=0, atol=1e-4)

    compared = compare_documents(bundle, checkpoint, _documents(), **OPTIONS)
    np.testing.assert_allclose(compared.score.nats, alone.nats, rtol=0, atol=1e-6)
    np.testing.assert_allclose(compared.reference.nats, expected.nats, rtol=0, atol=1e-6)
    assert 0 <= compared.kl < 1e-9
    assert compared.top1_agreement == 1
    assert compared.ratio().ratio == pytest.approx(1, abs=1e-5)


def _log_probabilities(executor: Executor, context: list[int]) -> Doubles:
    """Of the token after a context: the bundle run on nothing else, [V]."""
    ids_1S = np.array([context])
    cache = executor.new_cache(1, len(context))
    logits_V = executor.run(cache, ids_1S, np.array([0]), np.array([[len(context) - 1]]))[0, 0]
    shifted: Doubles = logits_V.astype(np.float64) - logits_V.max()
    result: Doubles = shifted - np.log(np.exp(shifted).sum())
    return result


def _contexts(document: list[int]) -> list[list[int]]:
    """What each token of a document is predicted from, by the rule that the docstring states."""
    width, contexts = LENGTH - 1, []
    for position in range(len(document)):
        moves = max(0, -(-(position + 1 - width) // STRIDE))
        end = min(width + moves * STRIDE, len(document))
        contexts.append([1, *document[max(0, end - width) : position]])
    return contexts


def test_int4_diverges_by_what_numpy_says(places: dict[str, Path]) -> None:
    paths = places["int4"], places["fp32"]
    compared = compare_documents(*map(open_model, paths), _documents(), **OPTIONS)

    quantised, exact = map(open_executor, paths)
    divergence, agreement, nats = [], [], []
    for document in _documents():
        tokens = [int(word[1:]) for word in document.content.split()]
        for token, context in zip(tokens, _contexts(tokens), strict=True):
            q, p = (_log_probabilities(executor, context) for executor in (quantised, exact))
            divergence.append(float(np.exp(p) @ (p - q)))
            agreement.append(p.argmax() == q.argmax())
            nats.append(-q[token])
    np.testing.assert_allclose(compared.divergence, divergence, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(compared.score.nats, nats, rtol=0, atol=1e-3)
    assert compared.agreement.tolist() == agreement
    assert compared.kl == pytest.approx(np.mean(divergence), rel=1e-4)
    assert compared.kl > 0.01
    low, high = compared.kl_interval()
    assert low < compared.kl < high
    assert compared.top1_agreement == np.mean(agreement) < 1


def test_bundle_without_a_tokenizer_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(places["int4"], bundle)
    manifest = read_manifest(bundle)
    bare = dataclasses.replace(manifest, files=(manifest.weights,))
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, {METADATA_KEY: bare.to_json()})
    onnx.save(model, bundle / "model.onnx")
    # The file that lies there is a stranger's
    with pytest.raises(DamagedBundleError, match=r"model.onnx has no tokenizer.json; text needs"):
        open_model(bundle)


def test_paths_that_hold_no_model_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a Hugging Face model directory"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        open_model(tmp_path / "absent")
    (tmp_path / "text.md").write_text("A text.")
    with pytest.raises(DamagedBundleError, match=r"text.md is not an ONNX model"):
        open_model(tmp_path / "text.md")
    with pytest.raises(DeviceError, match="unknown device 'abacus'"):
        open_model(places["fp32"], device="abacus")
