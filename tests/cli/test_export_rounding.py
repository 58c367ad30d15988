"""What the command line says of rounding, and hands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echoatt_cli import main


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "fp32", "--rounding", "nearest"], "fp32 rounds no weights to few bits"),
        (["--max-megabytes", "9"], "fp32 rounds no weights to few bits"),
        (
            ["--dtype", "int4", "--rounding", "nearest", "--calibration", "a.txt"],
            "reads no calibration text",
        ),
        (["--dtype", "int4", "--max-megabytes", "nan"], "a bundle of nan MB cannot be"),
        (
            ["--dtype", "int4", "--rounding", "nearest", "--max-megabytes", "9"],
            "does not know which weights to widen",
        ),
        (["--dtype", "int4", "--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "out.onnx"), *options]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert not list(tmp_path.iterdir())


def test_the_report_says_how_weights_were_rounded(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(checkpoint), str(tmp_path / "out.onnx"), "--dtype", "int8"]
    assert main([*command, "--rounding", "nearest", "--no-verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["manifest"]["specification"]["quantisation"]
    assert (found["rounding"], found["bits"], found["head_bits"]) == ("nearest", 8, 8)
