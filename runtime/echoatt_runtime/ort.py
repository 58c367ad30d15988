"""The one place that touches ONNX Runtime.

Sessions and bindings are made here, with options, providers and libraries; and what ONNX Runtime
raises, when a session is made and when it runs, becomes an `EchoAttError` here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoatt_runtime.contract import DEVICES, ElementType
from echoatt_runtime.errors import (
    DamagedBundleError,
    DeviceError,
    MissingDependencyError,
    OptionError,
    OutOfMemoryError,
    RunError,
    one_line,
)

__all__ = [
    "PROVIDERS",
    "Binding",
    "OrtSession",
    "SessionOptions",
    "SharedWeights",
    "TensorInfo",
    "cuda_library",
    "has_cuda",
    "import_onnxruntime",
    "open_session",
]

PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_WARNINGS: Final = 2
_ERRORS_ONLY: Final = 3
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"

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


def has_cuda() -> bool:
    """Whether ONNX Runtime's CUDA provider loads here and sees a GPU; no model is needed.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    try:
        _load_cuda(ort)
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
    return _load_cuda(import_onnxruntime())


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Weights in memory that several sessions read, each by its name in the graph.

    A session keeps them alive. What a session repacks for its kernels is its own all the same.

    Attributes:
        tensors: By name, the elements; read-only memory maps do.
        types: By name, what the elements are.
    """

    tensors: Mapping[str, npt.NDArray[Any]]
    types: Mapping[str, ElementType]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session is made.

    Attributes:
        device: "cpu" or "cuda"; a device that does not work is an error, never replaced.
        threads: CPU threads that one operator may use; None leaves it to ONNX Runtime.
        optimise: Whether ONNX Runtime may change the graph.
        prepack: Whether kernels may repack weights.
        warn: Whether ONNX Runtime writes warnings to standard error, and not errors alone.
        weights_folder: Where a model given as bytes has its weight file.
        weights: Weights that take the place of those in the file.
        libraries: Custom operators, as shared libraries.
        profile: What the trace's file name begins with; None does not profile.
        provider_options: Of the device's execution provider, by name.
    """

    device: str = "cpu"
    threads: int | None = None
    optimise: bool = True
    prepack: bool = True
    warn: bool = False
    weights_folder: Path | None = None
    weights: SharedWeights | None = None
    libraries: Sequence[Path] = ()
    profile: Path | None = None
    provider_options: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        type: Such as "tensor(float)".
        shape: Sizes; names or None where they are open.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


def open_session(model: Path | bytes, options: SessionOptions, where: str = "") -> OrtSession:
    """Open a session on the device and on nothing else.

    Args:
        model: The model file, or its bytes.
        options: How.
        where: What to call the model in an error; its path, if that is left out.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        OptionError: `threads` is not positive.
        DeviceError: The device is unknown, its provider did not load, or it lacks a kernel.
        OutOfMemoryError: There is no room for the model.
        DamagedBundleError: ONNX Runtime refuses the model, or a custom operator's library.
    """
    where = where or (str(model) if isinstance(model, Path) else "the model")
    if options.device not in DEVICES:
        raise DeviceError(f"unknown device {options.device!r}; use one of {', '.join(DEVICES)}")
    if options.threads is not None and options.threads < 1:
        raise OptionError(f"threads is {options.threads}; give at least 1, or None for all cores")
    ort = import_onnxruntime()
    provider = PROVIDERS[options.device]
    providers: list[Any] = [(provider, dict(options.provider_options or {}))]
    if options.device == "cuda":
        _load_cuda(ort)
        # Computations of shapes belong on the CPU, and are warned of where that is not named
        providers.append(PROVIDERS["cpu"])
    with _loading(ort, where, options.device):
        settings, kept = _settings(ort, options)
        session = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            sess_options=settings,
            providers=providers,
            enable_fallback=0,
        )
        opened = OrtSession(session, options.device, where, kept)
    if provider not in session.get_providers():
        raise DeviceError(
            f"{provider} did not load, and {options.device!r} is not replaced by the CPU; "
            "see that the GPU, its driver and the CUDA and cuDNN libraries fit onnxruntime-gpu "
            f"{ort.__version__}"
        )
    return opened


def _settings(ort: ModuleType, options: SessionOptions) -> tuple[Any, list[Any]]:
    """ONNX Runtime's own options, and what has to live as long as the session."""
    settings = ort.SessionOptions()
    settings.log_severity_level = _WARNINGS if options.warn else _ERRORS_ONLY
    # A decoder is one chain of operators: nothing to run side by side, all threads to each.
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.inter_op_num_threads = 1
    settings.intra_op_num_threads = options.threads or 0
    # Patterns are remembered per input shape, and every chunk and bucket is a new one.
    settings.enable_mem_pattern = False
    if not options.optimise:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if options.weights_folder is not None:
        settings.add_session_config_entry(_WEIGHTS_FOLDER, str(options.weights_folder.resolve()))
    for library in options.libraries:
        settings.register_custom_ops_library(str(library))
    if options.profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile)
    kept = []
    if options.weights is not None:
        for name, tensor in options.weights.tensors.items():
            number = options.weights.types[name].onnx
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor, number)
            settings.add_initializer(name, value)
            kept += [tensor, value]
    return settings, kept


class OrtSession:
    """A session, and what its runs took.

    Attributes:
        device: "cpu" or "cuda".
        where: The model's name in messages.
        inputs: Of the graph, in order.
        outputs: Of the graph, in order.
        run_seconds: Time that all runs so far took.
    """

    def __init__(self, session: Any, device: str, where: str, kept: Sequence[Any] = ()) -> None:
        self._session = session
        self._kept = kept
        self._ort = import_onnxruntime()
        self.device = device
        self.where = where
        self.inputs = [TensorInfo(v.name, v.type, tuple(v.shape)) for v in session.get_inputs()]
        self.outputs = [TensorInfo(v.name, v.type, tuple(v.shape)) for v in session.get_outputs()]
        self.run_seconds = 0.0

    def new_binding(self) -> Binding:
        """What a run reads and writes, to be filled."""
        return Binding(self._session.io_binding())

    def run(self, binding: Binding) -> None:
        """Run the graph.

        Raises:
            OutOfMemoryError: There is no room for what the graph computes.
            DeviceError: The device failed, or lacks a kernel.
            RunError: ONNX Runtime refuses what is bound.
        """
        begin = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding.io_binding)
        # ONNX Runtime raises many types, which share no base but Exception
        except Exception as error:
            raise _run_error(error, self.where, self.device) from error
        self.run_seconds += time.perf_counter() - begin

    def end_profiling(self) -> Path:
        """End the profiling that the options asked for; gives the trace's file."""
        return Path(self._session.end_profiling())


class Binding:
    """The memory that a run reads and writes.

    Memory that is named by its address must live as long as it is bound.

    Attributes:
        io_binding: ONNX Runtime's own.
    """

    def __init__(self, io_binding: Any) -> None:
        self.io_binding = io_binding
        # ONNX Runtime gives outputs in the order in which they were first bound
        self._order: dict[str, int] = {}

    def bind_input(
        self, name: str, device: str, elements: ElementType, shape: Sequence[int], address: int
    ) -> None:
        """Let an input be read from memory; it is read anew at every run.

        Args:
            name: The input's.
            device: Where the memory is: the session's device. Memory elsewhere would be copied when
                it is bound, and not again.
            elements: What is in it.
            shape: Its dimensions.
            address: Where it begins.
        """
        self.io_binding.bind_input(name, device, 0, elements.onnx, list(shape), address)

    def bind_output(
        self, name: str, device: str, elements: ElementType, shape: Sequence[int], address: int
    ) -> None:
        """Let an output be written to memory; arguments as `bind_input`, on any device."""
        self._order.setdefault(name, len(self._order))
        self.io_binding.bind_output(name, device, 0, elements.onnx, list(shape), address)

    def bind_open_output(self, name: str) -> None:
        """Let an output whose size is not known be written to new memory of the host."""
        self._order.setdefault(name, len(self._order))
        self.io_binding.bind_output(name, "cpu")

    def read_open_output(self, name: str) -> npt.NDArray[Any]:
        """What the last run wrote where `bind_open_output` asked for it."""
        found: npt.NDArray[Any] = self.io_binding.get_outputs()[self._order[name]].numpy()
        return found


@contextlib.contextmanager
def _loading(ort: ModuleType, where: str, device: str) -> Iterator[None]:
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


def _run_error(error: Exception, where: str, device: str) -> Exception:
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


def _load_cuda(ort: ModuleType) -> ctypes.CDLL:
    """Load the CUDA provider's library with all that it needs.

    ONNX Runtime itself only logs why it cannot be loaded, and goes on without the provider.

    Raises:
        DeviceError: It cannot be loaded, or there is none.
    """
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise DeviceError(
            "device 'cuda' needs onnxruntime-gpu and the installed ONNX Runtime is built without "
            "CUDA; pip uninstall onnxruntime, then pip install 'echoatt[gpu]'"
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
            "'echoatt[gpu]' brings the libraries it needs, the driver comes with the system"
        ) from error
    return library
