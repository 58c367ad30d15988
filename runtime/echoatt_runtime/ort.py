"""Devices and ONNX Runtime: found when a model is loaded, and never replaced by another device."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from echoatt_runtime.contract.manifest import DEVICES
from echoatt_runtime.errors import (
    DamagedBundleError,
    DeviceError,
    MissingDependencyError,
    OptionError,
    one_line,
)

PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LOG_ERRORS_ONLY: Final = 3

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


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({one_line(error)}); "
            "pip install 'echoatt[cpu]', or 'echoatt[gpu]' for CUDA"
        ) from error


def check_device(device: str, dtype: str, where: str) -> None:
    """Check that `device` exists and can run a bundle of `dtype`.

    Raises:
        DeviceError: It does not, or cannot.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cpu" and dtype == "bf16":
        raise DeviceError(
            f"{where} is a bf16 bundle and ONNX Runtime's CPU provider has no bf16 kernels; "
            "load it with device='cuda', or export with --dtype fp32, int8 or int4"
        )


def create_ort_session(path: Path, device: str, threads: int | None) -> Any:
    """Open an ONNX Runtime session on `device` and on nothing else.

    Args:
        path: The model file.
        device: "cpu" or "cuda".
        threads: Threads that one operator may use; None leaves it to ONNX Runtime.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        OptionError: `threads` is not positive.
        DeviceError: The device's provider did not load.
        DamagedBundleError: ONNX Runtime refuses the model.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; give at least 1, or None for all cores")
    ort = import_onnxruntime()
    provider = PROVIDERS[device]
    if device == "cuda":
        _prepare_cuda(ort)
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    # A decoder is one chain of operators: nothing to run side by side, all threads to each.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    # Patterns are remembered per input shape, and every chunk and bucket is a new one.
    options.enable_mem_pattern = False
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    model_faults = tuple(getattr(state, name) for name in _MODEL_FAULTS)
    machine_faults = tuple(getattr(state, name) for name in _MACHINE_FAULTS)
    try:
        session = ort.InferenceSession(
            str(path), sess_options=options, providers=[provider], enable_fallback=0
        )
    except model_faults as error:
        raise DamagedBundleError(
            f"ONNX Runtime {ort.__version__} refuses {path} ({one_line(error)}); "
            "export it again, or upgrade ONNX Runtime"
        ) from error
    except (RuntimeError, *machine_faults) as error:
        raise DeviceError(
            f"ONNX Runtime cannot run {path} on {device} ({one_line(error)}); "
            "see that the device works and has memory to spare"
        ) from error
    if provider not in session.get_providers():
        raise DeviceError(
            f"{provider} did not load, and {device!r} is not replaced by the CPU; "
            "see that the GPU, its driver and the CUDA and cuDNN libraries fit onnxruntime-gpu "
            f"{ort.__version__}"
        )
    return session


def _prepare_cuda(ort: ModuleType) -> None:
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise DeviceError(
            "device 'cuda' needs onnxruntime-gpu and the installed ONNX Runtime is built without "
            "CUDA; pip uninstall onnxruntime, then pip install 'echoatt[gpu]'"
        )
    # The wheels' own CUDA and cuDNN libraries are not on the loader's path.
    ort.preload_dlls()
    fault = _cuda_library_fault(Path(str(ort.__file__)).parent / "capi")
    if fault is not None:
        raise DeviceError(
            f"ONNX Runtime's CUDA provider cannot load ({fault}); pip install 'echoatt[gpu]' "
            "brings the libraries it needs, the driver comes with the system"
        )


def _cuda_library_fault(directory: Path) -> str | None:
    """Why the provider's library cannot be loaded.

    ONNX Runtime only logs the reason and goes on without the provider.
    """
    for stem in ("providers_shared", "providers_cuda"):
        library = directory / f"libonnxruntime_{stem}.so"
        if library.exists():
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                return one_line(error)
    return None
