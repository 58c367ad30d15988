"""A bundle appears whole or not at all, and never in another one's place."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from echoatt_exporter import (
    CheckpointError,
    ExportError,
    OutputExistsError,
    ParityError,
    PlanError,
    SharingPlan,
    bundle,
    export_bundle,
    rewrite_bundle,
)
from echoatt_exporter.bundle.write import BundlePath, copy_checkpoint_files, write_bundle
from echoatt_runtime import BundleError, BundleNotFoundError, EchoModel
from echoatt_runtime.executor.session import read_manifest

PAIRS = "2:1,3:1"


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_published_bundle_is_verified_and_says_by_what(unshared_bundle: Path) -> None:
    manifest = read_manifest(unshared_bundle)
    assert manifest.verification is not None
    assert manifest.verification.passed
    assert manifest.verification.provider == "CPUExecutionProvider"
    assert manifest.weights_file == "tiny.onnx.data"
    assert manifest.weights_bytes == unshared_bundle.with_name("tiny.onnx.data").stat().st_size
    assert not list(unshared_bundle.parent.glob(".echoatt-*"))


def test_rewritten_bundle_does_not_claim_to_be_verified(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    report = rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert report.manifest.sources == (0, 1, 1, 1)
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
    assert EchoModel.load(out).manifest.sources == (0, 1, 1, 1)


def test_another_models_tokenizer_is_not_replaced(unshared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"config\.json exists and differs.*another model"):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert _files(tmp_path) == {"config.json": b"{}"}


def test_two_bundles_of_one_model_share_a_directory(unshared_bundle: Path, tmp_path: Path) -> None:
    rewrite_bundle(unshared_bundle, tmp_path / "a.onnx", "2:1")
    rewrite_bundle(unshared_bundle, tmp_path / "b.onnx", PAIRS)
    assert EchoModel.load(tmp_path / "a.onnx").manifest.sources == (0, 1, 1, 3)
    assert EchoModel.load(tmp_path / "b.onnx").manifest.sources == (0, 1, 1, 1)


@pytest.mark.parametrize("force", [False, True])
def test_killed_export_leaves_nothing_that_loads(
    unshared_bundle: Path, tmp_path: Path, force: bool
) -> None:
    """SIGKILL while weights are being written, which no handler can soften."""
    out = tmp_path / "out.onnx"
    if force:
        rewrite_bundle(unshared_bundle, out, "2:1")
    before = _files(tmp_path)
    script = f"""
import os, signal
from echoatt_exporter import rewrite_bundle
def on_step(step, done, total):
    if step == "write" and done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
rewrite_bundle({str(unshared_bundle)!r}, {str(out)!r}, {PAIRS!r}, force={force}, on_step=on_step)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    if force:
        assert EchoModel.load(out).manifest.sources == (0, 1, 1, 3)
    else:
        with pytest.raises(BundleNotFoundError):
            EchoModel.load(out)
    rewrite_bundle(unshared_bundle, out, PAIRS, force=force)
    assert EchoModel.load(out).manifest.sources == (0, 1, 1, 1)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_death_while_publishing_never_pairs_a_model_with_foreign_weights(
    unshared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Whatever was moved, what loads is the old bundle or nothing."""
    out = tmp_path / "out.onnx"
    rewrite_bundle(unshared_bundle, out, "2:1")
    replace = Path.replace
    count = 0

    def dying_replace(self: Path, target: Path) -> Path:
        nonlocal count
        if self.parent.name.startswith(".echoatt-"):
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        rewrite_bundle(unshared_bundle, out, "3:1", force=True)
    monkeypatch.undo()
    with pytest.raises(BundleError):
        EchoModel.load(out)


def test_bundle_that_fails_its_verification_is_not_published(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    def fail(path: Path) -> None:
        assert path.is_file()
        raise ParityError("different")

    with pytest.raises(ParityError):
        write_bundle(
            ir.load(unshared_bundle),
            read_manifest(unshared_bundle),
            BundlePath.of(tmp_path / "out.onnx"),
            lambda _: None,
            force=False,
            verify=fail,
        )
    assert _files(tmp_path) == {}


def test_tokenizer_that_does_not_load_is_not_left_out_in_silence(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        copy_checkpoint_files(source, target)


def test_full_disk_is_told_before_writing(
    unshared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ExportError, match="make room"):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert _files(tmp_path) == {}


def test_disk_that_fills_up_while_writing_loses_nothing(
    unshared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle.ir, "save", no_room)
    with pytest.raises(ExportError, match="no room left on the disk"):
        rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS)
    assert _files(tmp_path) == {}


def test_output_that_cannot_be_made_is_told(unshared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot make the directory"):
        rewrite_bundle(unshared_bundle, tmp_path / "file" / "out.onnx", PAIRS)
    (tmp_path / "directory.onnx").mkdir()
    with pytest.raises(ExportError, match="is a directory"):
        rewrite_bundle(unshared_bundle, tmp_path / "directory.onnx", PAIRS)


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


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_refused_for_the_cpu_with_the_reason(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ExportError, match=f"{dtype} is not for the CPU.*--device cuda"):
        export_bundle(tmp_path, tmp_path / "out.onnx", dtype=dtype)


def test_report_as_json_holds_manifest_and_passes(unshared_bundle: Path, tmp_path: Path) -> None:
    report = json.loads(rewrite_bundle(unshared_bundle, tmp_path / "out.onnx", PAIRS).to_json())
    assert report["manifest"]["sources"] == [0, 1, 1, 1]
    removed = sum(
        entry["before"]["parameters"] - entry["after"]["parameters"] for entry in report["passes"]
    )
    # Two followers' query and key weights: 32 wide, 4 query and 2 key heads of 12
    assert removed == 2 * 32 * (4 + 2) * 12
