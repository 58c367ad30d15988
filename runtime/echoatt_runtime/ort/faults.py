"""What ONNX Runtime raises, as errors of ours."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Final

from echoatt_runtime.errors import (
    DamagedBundleError,
    DeviceError,
    OutOfMemoryError,
    RunError,
    one_line,
)

# How ONNX Runtime says that the file, not the machine, is at fault. Its exceptions have no common
# base but Exception.
_MODEL_FAULTS: Final = (
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NoSuchFile",
    "NotImplemented",
)
_MACHINE_FAULTS: Final = ("EPFail", "EngineError", "RuntimeException")
# The words of its allocators, of the C++ library and of CUDA
_OUT_OF_MEMORY: Final = re.compile(
    r"bad.?alloc|failed to allocate|out of memory|cannot allocate|allocation failed|"
    r"not enough memory|memory allocation|smaller than requested bytes|alloc_failed",
    re.IGNORECASE,
)
# What a call of CUDA's libraries gave back; ONNX Runtime has no type of its own for it
_DEVICE_FAILED: Final = re.compile(r"\b(CUDA|CUBLAS|CUDNN) failure \d")


@contextlib.contextmanager
def loading(ort: ModuleType, where: str, device: str) -> Iterator[None]:
    """Turn what making a session raises into an error of ours."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    # A name in the graph that is no text is only found when it is asked for
    model_faults: tuple[type[Exception], ...] = (
        UnicodeDecodeError,
        *(getattr(state, name) for name in _MODEL_FAULTS),
    )
    machine_faults = tuple(getattr(state, name) for name in _MACHINE_FAULTS)
    try:
        yield
    except (MemoryError, RuntimeError, *model_faults, *machine_faults) as error:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemoryError(
                f"there is no memory left on {device} to load {where} ({one_line(error)}); "
                "close what else uses it, or export with a smaller --dtype"
            ) from error
        if isinstance(error, state.NotImplemented):
            raise DeviceError(
                f"ONNX Runtime {ort.__version__} has no kernel on {device} for {where} "
                f"({one_line(error)}); load it on the device it was exported for, or upgrade ONNX "
                "Runtime"
            ) from error
        if isinstance(error, model_faults) and not _DEVICE_FAILED.search(str(error)):
            raise DamagedBundleError(
                f"ONNX Runtime {ort.__version__} refuses {where} ({one_line(error)}); "
                "export it again, or upgrade ONNX Runtime"
            ) from error
        raise DeviceError(
            f"ONNX Runtime cannot run {where} on {device} ({one_line(error)}); "
            "see that the device works and has memory to spare"
        ) from error


def run_error(error: Exception, where: str, device: str) -> Exception:
    """What a run raised, as an error of ours."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    said = one_line(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(said):
        return OutOfMemoryError(
            f"there is no memory left on {device} for a step of {where} ({said}); "
            "run fewer prompts at once, shorter ones, or smaller chunks of them (prefill_chunk)"
        )
    if isinstance(error, state.NotImplemented):
        return DeviceError(
            f"ONNX Runtime has no kernel on {device} for a step of {where} ({said}); "
            "load it on the device it was exported for, or upgrade ONNX Runtime"
        )
    if isinstance(error, (state.EPFail, state.EngineError)) or _DEVICE_FAILED.search(said):
        return DeviceError(
            f"{device} failed in a step of {where} ({said}); see that the device works"
        )
    return RunError(
        f"ONNX Runtime refuses a step of {where} ({said}); export the bundle again, and report "
        "this if it happens again"
    )
