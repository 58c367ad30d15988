"""Load a model file into ONNX Runtime, in a process of its own: `load_file.py FILE DEVICE`.

Run by path, so that it imports the runtime and neither the exporter nor torch. Nobody else writes
to this process's standard error, which is why every word there between the two marks is ONNX
Runtime's about the file. Standard output says why the file was refused. Nothing limits the time: a
large model on a slow disk takes what it takes. Whoever ends the parent ends this process too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Final

REFUSED: Final = 10
NO_MEMORY: Final = 11
# No text holds this byte
MARK: Final = b"\0"

_SET_PARENT_DEATH_SIGNAL = 1


def main(path: str, device: str) -> int:
    """Load the file and say how that went.

    Returns:
        0, `REFUSED` or `NO_MEMORY`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Libraries print; their words go to standard error and the answer keeps a pipe of its own.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Here, so that what libraries say of the machine is said before the mark
    from echoatt_runtime.errors import EchoAttError, OutOfMemoryError
    from echoatt_runtime.ort import SessionOptions, import_onnxruntime, open_session

    import_onnxruntime()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, MARK)
    # The file is what is checked, and not what ONNX Runtime makes of it: left to itself it would
    # convert a 16-bit model's weights to float32 for the CPU, three times the file in memory.
    options = SessionOptions(device=device, optimise=False, prepack=False, warn=True)
    code = 0
    try:
        open_session(Path(path), options, Path(path).name)
    except EchoAttError as error:
        code = NO_MEMORY if isinstance(error, OutOfMemoryError) else REFUSED
        answer.write(str(error))
    answer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, MARK)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
