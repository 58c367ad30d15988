"""Load a model file into ONNX Runtime, in a process of its own: `load_file.py FILE PROVIDER`.

Run by path, so that it imports neither the exporter nor torch. Nobody else writes to this process's
standard error, which is why every word there between the two marks is ONNX Runtime's about the
file. Standard output says why the file was refused. Nothing limits the time: a large model on a
slow disk takes what it takes. Whoever ends the parent ends this process too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

REFUSED: Final = 10
NO_MEMORY: Final = 11
# No text holds this byte
MARK: Final = b"\0"

_WARNING = 2
_SET_PARENT_DEATH_SIGNAL = 1
# How ONNX Runtime and what is below it say that memory is short; it has no exception for that
_WANT_OF_MEMORY = (
    "bad_alloc",
    "Failed to allocate memory",
    "Cannot allocate memory",
    "out of memory",
)


def create_session(path: str, provider: str) -> None:
    """Make a session as checks need it: as the file is, and with every warning said."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _WARNING
    # The file is what is checked, and not what ONNX Runtime makes of it: left to itself it would
    # convert a 16-bit model's weights to float32 for the CPU, three times the file in memory.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} did not load")


def main(path: str, provider: str) -> int:
    """Load the file and say how that went.

    Returns:
        0, `REFUSED` or `NO_MEMORY`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Libraries print; their words go to standard error and the answer keeps a pipe of its own.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # here, so that what it says of the machine is said before the mark
    import onnxruntime

    if provider != "CPUExecutionProvider":
        # the wheels' own CUDA and cuDNN libraries are not on the loader's path
        onnxruntime.preload_dlls()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, MARK)
    code = 0
    try:
        create_session(path, provider)
    # ONNX Runtime raises many types, which share no base but Exception
    except Exception as error:  # noqa: BLE001
        said = str(error) or type(error).__name__
        short = isinstance(error, MemoryError) or any(word in said for word in _WANT_OF_MEMORY)
        code = NO_MEMORY if short else REFUSED
        answer.write(said)
    answer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, MARK)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
