"""Bundles in int8 and int4: how large, how rounded, how held against their checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.quantisation import to_nearest

from echoatt_exporter import (
    ExportError,
    ExportReport,
    ParityError,
    RoundingChoice,
    TextError,
    check_parity,
    export_bundle,
    rewrite_bundle,
)
from echoatt_exporter.architecture import architecture_of, specification_fields
from echoatt_exporter.graph.weights import separate_names
from echoatt_exporter.quantise.choose_widths import choose_widths
from echoatt_exporter.quantise.draw_windows import draw_windows
from echoatt_exporter.quantise.quantise import quantise_student
from echoatt_exporter.quantise.round_weights import round_calibrated
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_exporter.texts import read_texts
from echoatt_runtime import EchoModel
from echoatt_runtime.bundle import Bundle, read_onnx_file
from echoatt_runtime.contract import (
    SharingPlan,
    SourceCheckpoint,
    Specification,
    lay_out_caches,
)
from echoatt_runtime.errors import DamagedBundleError, NumericalError

TABLE = "lm_head.weight.q"
SHAPE = {
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 256,
}
PAIRS = "2:1,3:1"


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of 4 layers."""
    path: Path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """Exported as it is by default."""
    return export_bundle(checkpoint, tmp_path_factory.mktemp("int4") / "tiny.onnx", dtype="int4")


def test_a_tied_table_is_stored_once(calibrated: ExportReport) -> None:
    tensors = {tensor.name: tensor for tensor in read_onnx_file(calibrated.model).external}
    table, rows = tensors[TABLE], tensors[f"{TABLE}.rows"]
    assert (table.offset, table.length) == (rows.offset, rows.length)
    assert (table.dims, rows.dims) == ((200, 4, 16), (200, 64))
    stored = sum(tensor.length or 0 for tensor in tensors.values()) - (table.length or 0)
    assert calibrated.manifest.weights.bytes == stored
    # 4 bits and a 32nd of a float32 an element, and the padding of the output projections
    assert stored < 0.65 * calibrated.parameters


def test_a_bundle_says_how_it_was_rounded(calibrated: ExportReport) -> None:
    found = json.loads(calibrated.to_json())["manifest"]["specification"]["quantisation"]
    assert found == {
        "rounding": "calibrated", "block_size": 32, "bits": 4, "head_bits": 4,
        "embedding_bits": 4, "scaled_channels": False, "wide": [],
        "text": "written by the model", "tokens": 24 * 64,
    }  # fmt: skip
    verification = calibrated.manifest.verification
    assert verification is not None
    assert verification.passed
    assert verification.rounding_cost is not None


def test_parity_holds_a_calibrated_bundle_by_its_own_weights(
    calibrated: ExportReport, checkpoint: Path
) -> None:
    report = check_parity(checkpoint, calibrated.model, max_context=40)
    assert report.passed
    assert report.unrounded is not None
    assert report.unrounded.mean_kl > 0


def test_a_scale_that_is_a_little_off_is_not_taken(
    calibrated: ExportReport, checkpoint: Path, tmp_path: Path
) -> None:
    for path in calibrated.model.parent.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    model = tmp_path / calibrated.model.name
    (scales,) = (
        tensor
        for tensor in read_onnx_file(model).external
        if tensor.name == "model.layers.1.mlp.down_proj.weight.scales"
    )
    weights = np.memmap(model.with_name(scales.location), np.uint8, "r+")
    part = weights[scales.offset : scales.offset + (scales.length or 0)].view(np.float32)
    part *= 1.01
    weights.flush()
    with pytest.raises(DamagedBundleError, match=r"tiny\.onnx\.data"):
        check_parity(checkpoint, model, max_context=40)


def test_another_checkpoints_bundle_is_refused(
    calibrated: ExportReport, tiny_model: Any, tmp_path: Path
) -> None:
    other = tiny_model("llama", seed=9, **SHAPE)
    other.save_pretrained(tmp_path)
    with pytest.raises(ParityError, match="away from the checkpoint's"):
        check_parity(tmp_path, calibrated.model, max_context=40)


def test_a_rewritten_bundle_stores_the_table_once_too(
    calibrated: ExportReport, checkpoint: Path, tmp_path: Path
) -> None:
    report = rewrite_bundle(calibrated.model, tmp_path / "shared.onnx", PAIRS)
    tensors = {tensor.name: tensor for tensor in read_onnx_file(report.model).external}
    assert tensors[TABLE].offset == tensors[f"{TABLE}.rows"].offset
    before, after = (
        bundle.manifest.weights.bytes
        for bundle in (Bundle.open(calibrated.model), Bundle.open(report.model))
    )
    assert before is not None
    assert after is not None
    assert after < before
    assert report.manifest.specification.quantisation == (
        calibrated.manifest.specification.quantisation
    )
    # The followers' values were cut out of packed weights
    assert check_parity(checkpoint, report.model, max_context=40).passed


def test_rounding_to_the_nearest_is_done_again_for_parity(checkpoint: Path, tmp_path: Path) -> None:
    report = export_bundle(
        checkpoint,
        tmp_path / "tiny.onnx",
        PAIRS,
        dtype="int8",
        rounding=RoundingChoice(rounding="nearest"),
        verify=False,
    )
    quantisation = report.manifest.specification.quantisation
    assert quantisation is not None
    assert (quantisation.rounding, quantisation.text, quantisation.tokens) == ("nearest", None, 0)
    assert check_parity(checkpoint, report.model, max_context=40).passed
    assert EchoModel.load(report.model).logits([1, 2, 3]).shape == (3, 200)


def test_a_larger_bundle_may_be_allowed(checkpoint: Path, tmp_path: Path) -> None:
    """Room for some weights at 8 bits, and not for all."""
    megabytes = 0.48
    report = export_bundle(
        checkpoint,
        tmp_path / "tiny.onnx",
        "2:1",
        dtype="int4",
        rounding=RoundingChoice(max_megabytes=megabytes),
        verify=False,
    )
    quantisation = report.manifest.specification.quantisation
    assert quantisation is not None
    wide = quantisation.wide
    assert 0 < len(wide) < 26
    # What one product computes has one width
    for layer in range(4):
        names = {name for name in wide if name.startswith(f"model.layers.{layer}.")}
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            found = [name for name in names if name.endswith(group)]
            assert len(found) in (0, len(group), 1 if layer == 2 else 0)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.8 * megabytes * 1e6 < size <= megabytes * 1e6
    widths = {
        name.removesuffix(".weight.q"): tensor.dims[-1] // 16 * 4
        for name, tensor in (
            (tensor.name, tensor) for tensor in read_onnx_file(report.model).external
        )
        if name.endswith(".weight.q")
    }
    for name, bits in widths.items():
        if name != "lm_head":
            assert bits == (8 if separate_names(name)[0] in wide else 4), name
    assert check_parity(checkpoint, report.model, max_context=40).passed

    with pytest.raises(ExportError, match=r"the weights take 0\.\d MB more than there is room"):
        export_bundle(
            checkpoint,
            tmp_path / "small.onnx",
            dtype="int4",
            rounding=RoundingChoice(max_megabytes=0.2),
        )


def test_calibration_text_can_be_given(stories260k: Path, shared_dir: Path) -> None:
    text = shared_dir / "data" / "tinystories.txt"
    student = load_shared(stories260k, None, dtype=torch.float32)
    fields = specification_fields(architecture_of(student.config.get_text_config()))
    plan = SharingPlan.unshared(5)
    specification = Specification(
        **fields,
        plan=plan,
        dtype="int4",
        device="cpu",
        caches=lay_out_caches(plan, fields["kv_heads"], fields["head_dims"], "float32"),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
        source_checkpoint=SourceCheckpoint(name="stories", sha256="0" * 64),
    )
    quantisation = quantise_student(
        student,
        specification,
        RoundingChoice(texts=[text]),
        read_texts([text]),
        model_dir=stories260k,
        other_bytes=0,
    ).quantisation
    assert quantisation is not None
    assert quantisation.text is not None
    assert quantisation.text.startswith("given, SHA-256 ")
    assert quantisation.tokens == 24 * 256


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dtype": "fp32", "rounding": {"rounding": "nearest"}},
            ExportError,
            "fp32 rounds no weights",
        ),
        (
            {"dtype": "int4", "rounding": {"rounding": "stochastic"}},
            ExportError,
            "unknown rounding 'stochastic'",
        ),
        (
            {"dtype": "int4", "rounding": {"rounding": "nearest", "texts": ["a.txt"]}},
            ExportError,
            "reads no calibration text",
        ),
        (
            {"dtype": "int8", "rounding": {"max_megabytes": 5}},
            ExportError,
            "int8 has 8 bits everywhere",
        ),
        (
            {"dtype": "int4", "rounding": {"texts": ["/nowhere.txt"]}},
            TextError,
            "/nowhere.txt",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_bundle(
            checkpoint,
            tmp_path / "out.onnx",
            dtype=options["dtype"],
            rounding=RoundingChoice(**options["rounding"]),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["calibration", "widths", "text"])
def test_a_model_that_computes_no_numbers_is_refused(tiny_model: Any, part: str) -> None:
    broken = tiny_model("llama", num_hidden_layers=2)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    student = share_attention(broken, SharingPlan.unshared(2)).eval()
    chosen, windows = to_nearest(4), torch.zeros((2, 8), dtype=torch.int64)
    attempts = {
        "calibration": lambda: round_calibrated(student, chosen, windows, lambda *_: None),
        "widths": lambda: choose_widths(student, chosen, windows, 10**9),
        "text": lambda: draw_windows(student, count=2, length=8, begin=None),
    }
    with pytest.raises(NumericalError, match="weights are whole"):
        attempts[part]()
