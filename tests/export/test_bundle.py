"""A bundle appears whole or not at all, and never in another one's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from echoatt_exporter import (
    ExportError,
    OutputExistsError,
    ParityError,
    PlanError,
    SharingPlan,
    rewrite_bundle,
)
from echoatt_exporter.bundle import BundlePath, open_stage, write_bundle
from echoatt_runtime import EchoModel
from echoatt_runtime.bundle import Bundle, read_manifest

PAIRS = "2:1,3:1"


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_published_bundle_is_verified_and_says_by_what(unshared_bundle: Path) -> None:
    manifest = read_manifest(unshared_bundle)
    assert manifest.verification is not None
    assert manifest.verification.passed
    assert manifest.verification.provider == "CPUExecutionProvider"
    assert manifest.weights.name == "tiny.onnx.data"
    assert [file.name for file in manifest.companions] == ["config.json", "generation_config.json"]
    assert Bundle.open(unshared_bundle, verify=True).manifest == manifest
    assert not list(unshared_bundle.parent.glob(".echoatt-*"))


def test_rewritten_bundle_does_not_claim_to_be_verified(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    report = rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert report.manifest.specification.plan.sources == (0, 1, 1, 1)
    assert read_manifest(tmp_path / "out.onnx").verification is None


def test_bundle_can_be_moved_with_its_weights(unshared_bundle: Path, tmp_path: Path) -> None:
    for path in unshared_bundle.parent.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    assert EchoModel.load(tmp_path / "tiny.onnx").logits([1, 2, 3]).shape == (3, 61)


@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.data"])
def test_existing_output_is_refused_and_kept(
    unshared_bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="--force"):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert _files(tmp_path) == {name: b"precious"}


def test_force_replaces_a_bundle(unshared_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    rewrite_bundle(unshared_bundle, out, "2:1")
    rewrite_bundle(unshared_bundle, out, PAIRS, force=True)
    assert EchoModel.load(out).manifest.specification.plan.sources == (0, 1, 1, 1)


def test_bundle_that_fails_its_verification_is_not_published(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    def fail(staged: Bundle) -> None:
        assert staged.model.is_file()
        raise ParityError("different")

    with pytest.raises(ParityError), open_stage(tmp_path) as stage:
        write_bundle(
            ir.load(unshared_bundle),
            read_manifest(unshared_bundle).specification,
            stage,
            BundlePath.of(tmp_path / "out.onnx"),
            force=False,
            verify=fail,
        )
    assert _files(tmp_path) == {}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "needs a sharing plan"),
        ("1:2", "not earlier"),
        ("2:1,3:2", "itself a follower"),
        ("9:1", "outside layers"),
    ],
)
def test_rewrite_refuses_a_plan_that_does_not_fit(
    unshared_bundle: Path, tmp_path: Path, plan: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", plan)
    assert _files(tmp_path) == {}


def test_rewrite_refuses_a_plan_that_moves_heads(unshared_bundle: Path, tmp_path: Path) -> None:
    plan = SharingPlan((0, 1, 1, 1), ((), (), (2, 3, 0, 1), ()))
    with pytest.raises(PlanError, match=r"moves heads.*share the checkpoint first"):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", plan)
    assert list(tmp_path.iterdir()) == []


def test_rewrite_refuses_a_shared_bundle_and_its_own_input(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    rewrite_bundle(unshared_bundle, out, PAIRS)
    with pytest.raises(PlanError, match="shared already"):
        rewrite_bundle(out, tmp_path / "again.onnx", "3:1")
    with pytest.raises(ExportError, match="is the input itself"):
        rewrite_bundle(out, out, PAIRS, force=True)


def test_report_as_json_holds_manifest_and_passes(unshared_bundle: Path, tmp_path: Path) -> None:
    report = json.loads(rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS).to_json())
    assert report["manifest"]["specification"]["plan"]["sources"] == [0, 1, 1, 1]
    removed = sum(
        entry["before"]["parameters"] - entry["after"]["parameters"] for entry in report["passes"]
    )
    # Two followers' query and key weights: 32 wide, 4 query and 2 key heads of 12
    assert removed == 2 * 32 * (4 + 2) * 12
