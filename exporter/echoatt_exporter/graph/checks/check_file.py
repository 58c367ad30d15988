"""Checks of the written file: is it valid ONNX, and does ONNX Runtime load it without a warning?"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx

from echoatt_exporter.errors import ContractError, ExportError
from echoatt_exporter.graph.checks import load_file
from echoatt_runtime.errors import one_line

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def check_file(path: str | Path, device: str | None = "cpu") -> None:
    """Check a model file with `onnx.checker`, shapes included, and load it into ONNX Runtime.

    Args:
        path: The .onnx file, with its external data beside it.
        device: The device to load it on; None to leave that out, for bfloat16 where there is no GPU
            (ONNX Runtime's CPU provider has no bfloat16 MatMul).

    Raises:
        ContractError: The checker refuses it, ONNX Runtime cannot load it, warns or crashes.
        ExportError: There is too little memory to load it, or no process to load it in.
    """
    name = Path(path).name
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"{name} is not valid ONNX: {one_line(error)}") from error
    if device is not None:
        _load(path, device)


def _load(path: str | Path, device: str) -> None:
    """Load a model file in a process of its own, and raise if that fails or writes a warning.

    In this process the words of ONNX Runtime could not be told from those of a progress bar, and a
    file that crashes ONNX Runtime would end the export without a word.
    """
    name = Path(path).name
    # -P: what lies beside the program is no package to import from
    command = [sys.executable, "-P", load_file.__file__, str(path), device]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)  # noqa: S603
    except OSError as error:
        raise ExportError(
            f"{name} cannot be checked: no process starts to load it ({one_line(error)})"
        ) from error
    started, mark, judged = done.stderr.partition(load_file.MARK)
    words = _lines(judged.partition(load_file.MARK)[0] if mark else started)
    refusal = " ".join(done.stdout.decode(errors="replace").split())
    if done.returncode == load_file.REFUSED:
        raise ContractError(refusal)
    if done.returncode == load_file.NO_MEMORY:
        raise ExportError(refusal)
    if done.returncode != 0:
        raise _end_error(name, done.returncode, f" ({words[-1]})" if words else "")
    if words:
        first, *others = words
        more = f" (and {len(others)} lines more)" if others else ""
        raise ContractError(f"ONNX Runtime warns about {name}: {first}{more}")


def _end_error(name: str, code: int, last: str) -> ExportError:
    """What to raise where the process ended before it had an answer."""
    if code == -signal.SIGKILL:
        return ExportError(
            f"the process that loads {name} into ONNX Runtime was killed, most likely for want of"
            f" memory{last}; free some, or export on a larger machine"
        )
    if code < 0:
        return ContractError(
            f"ONNX Runtime crashes when it loads {name}: {signal.strsignal(-code)}{last}"
        )
    return ExportError(
        f"{name} cannot be checked: the process that loads it ended with {code}{last}"
    )


def _lines(words: bytes) -> list[str]:
    return _COLOUR.sub("", words.decode(errors="replace")).strip().splitlines()
