"""Checks of the written file: is it valid ONNX, and does ONNX Runtime load it without a warning?"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
import onnxruntime

from echoatt_exporter.errors import ContractError
from echoatt_runtime.errors import one_line
from echoatt_runtime.ort import PROVIDERS

_WARNING = 2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def check_file(path: str | Path, provider: str | None = PROVIDERS["cpu"]) -> None:
    """Check a model file with `onnx.checker`, shapes included, and load it into ONNX Runtime.

    Args:
        path: The .onnx file, with its external data beside it.
        provider: The execution provider to load it on; None to leave that out, for bfloat16 where
            there is no GPU (the CPU provider has no bfloat16 MatMul).

    Raises:
        ContractError: The checker refuses it, ONNX Runtime cannot load it, or warns.
    """
    name = Path(path).name
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"{name} is not valid ONNX: {one_line(error)}") from error
    if provider is not None:
        _load(path, provider)


def _load(path: str | Path, provider: str) -> None:
    """Load a model file, and raise if that fails or writes a warning."""
    name = Path(path).name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _WARNING
    # The file is what is checked, and not what ONNX Runtime makes of it: left to itself it would
    # convert a 16-bit model's weights to float32 for the CPU, three times the file in memory.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    with _stderr_to_file() as log:
        failure: Exception | None = None
        try:
            onnxruntime.InferenceSession(str(path), options, providers=[provider])
        # ONNX Runtime raises many types, which share no base but Exception
        except Exception as error:  # noqa: BLE001
            failure = error
        log.seek(0)
        warnings = _COLOUR.sub("", log.read().decode(errors="replace")).strip()
    if failure is not None:
        raise ContractError(f"ONNX Runtime does not load {name}: {one_line(failure)}") from failure
    if warnings:
        first, *others = warnings.splitlines()
        more = f" (and {len(others)} lines more)" if others else ""
        raise ContractError(f"ONNX Runtime warns about {name}: {first}{more}")


@contextlib.contextmanager
def _stderr_to_file() -> Iterator[IO[bytes]]:
    """Send what this process's native code writes to descriptor 2 into a file."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield file
            finally:
                os.dup2(saved, 2)
    finally:
        os.close(saved)
