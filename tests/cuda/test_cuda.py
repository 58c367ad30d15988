import ctypes.util
import os

import pytest

from echoatt_runtime import DeviceError
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.ort import PROVIDERS, import_onnxruntime

OVER_STAND_INS = ("tests/cuda/over_stand_ins.py", "tests/cuda/decode_over_stand_ins.py")
FOR_ANY_MEMORY = ("tests/runtime/cache/test_kv_cache.py", "tests/runtime/cache/test_memory.py")


def test_over_stand_ins(run_python, stand_ins, tmp_path):
    """Runs tests in a process where CUDA works, but for its kernels; see `over_stand_ins`."""
    done = run_python(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *(*FOR_ANY_MEMORY, *OVER_STAND_INS),
        env={
            "ECHOATT_TEST_DEVICE": "cuda",
            "LD_LIBRARY_PATH": f"{stand_ins}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "CUDA_STUB_LOG": str(tmp_path / "log"),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


WITHOUT_LIBRARIES = """
from echoatt_runtime import DeviceError
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.ort import has_cuda

assert not has_cuda()
try:
    CudaMemory(0)
except DeviceError as error:
    print(error)
"""


def test_without_the_libraries_that_the_provider_needs(run_python):
    if ctypes.util.find_library("cublasLt"):
        pytest.skip("CUDA's libraries are installed here")
    done = run_python("-W", "error", "-c", WITHOUT_LIBRARIES, env={})
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    assert "CUDA provider cannot load (libcublas" in said
    assert done.stderr == ""


def test_without_a_build_for_cuda():
    if PROVIDERS["cuda"] in import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    with pytest.raises(DeviceError, match="needs onnxruntime-gpu"):
        CudaMemory(0)
