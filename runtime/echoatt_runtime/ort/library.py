"""ONNX Runtime's library, and whether it can use a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

from echoatt_runtime.errors import DeviceError, MissingDependencyError, one_line

PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}


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
            "pip install onnxruntime, or for CUDA 'onnxruntime-gpu[cuda,cudnn]'"
        ) from error


def has_cuda() -> bool:
    """Whether ONNX Runtime's CUDA provider loads here and sees a GPU; no model is needed.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    try:
        load_cuda(ort)
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except DeviceError:
        return False
    # What the provider raises without a GPU has no type of its own
    except Exception:  # noqa: BLE001
        return False
    return True


def cuda_library() -> ctypes.CDLL:
    """The CUDA provider's library, in which the functions of CUDA's own runtime are found too.

    A library's functions are looked up in what it needs as well: so these are the ones that ONNX
    Runtime calls, whatever version of CUDA it was built for and whatever else is loaded.

    Raises:
        DeviceError: ONNX Runtime is built without CUDA, or the library cannot be loaded.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    return load_cuda(import_onnxruntime())


def load_cuda(ort: ModuleType) -> ctypes.CDLL:
    """Load the CUDA provider's library with all that it needs.

    ONNX Runtime itself only logs why it cannot be loaded, and goes on without the provider.

    Raises:
        DeviceError: It cannot be loaded, or there is none.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise DeviceError(
            "device 'cuda' needs onnxruntime-gpu and the installed ONNX Runtime is built without "
            "CUDA; pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    # The wheels' own CUDA and cuDNN libraries are not on the loader's path. What this function
    # prints of those that are absent is raised below.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    folder = Path(str(ort.__file__)).parent / "capi"
    try:
        for stem in ("shared", "cuda"):
            path = folder / f"libonnxruntime_providers_{stem}.so"
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(
            f"ONNX Runtime's CUDA provider cannot load ({one_line(error)}); pip install "
            "'onnxruntime-gpu[cuda,cudnn]' brings the libraries it needs, the driver comes with the"
            " system"
        ) from error
    return library
