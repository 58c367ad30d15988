"""Sessions: how they are made, and how they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy.typing as npt

from echoatt_runtime.contract import DEVICES, ElementType
from echoatt_runtime.errors import DeviceError, OptionError
from echoatt_runtime.ort.binding import Binding
from echoatt_runtime.ort.faults import loading, run_error
from echoatt_runtime.ort.lent_tensor import LentWeights, lend
from echoatt_runtime.ort.library import PROVIDERS, import_onnxruntime, load_cuda
from echoatt_runtime.plain_values import as_integer

# More than any machine has cores; ONNX Runtime would try to start as many as it is told
_MOST_THREADS: Final = 65536
_WARNINGS: Final = 2
_ERRORS_ONLY: Final = 3
# It fuses a mask and a Softmax whose sizes are known into what cuDNN computes behind 1,024 tokens
_NOT_FOR_CUDA: Final = ["BiasSoftmaxFusion"]
_GRAPH: Final = "gpu_graph_id"
_NO_GRAPH: Final = "-1"
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"


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
        lent: Weights on a CUDA device that do.
        sizes: Dimensions that the graph names, where a session is for one size only.
        capture: Whether runs on a CUDA device are captured as CUDA graphs, each by its number.
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
    lent: LentWeights | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    capture: bool = False
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
        OptionError: `threads` is no positive integer.
        DeviceError: The device is unknown, its provider did not load, or it lacks a kernel.
        OutOfMemoryError: There is no room for the model.
        DamagedBundleError: ONNX Runtime refuses the model, or a custom operator's library.
    """
    where = where or (str(model) if isinstance(model, Path) else "the model")
    if options.device not in DEVICES:
        raise DeviceError(f"unknown device {options.device!r}; use one of {', '.join(DEVICES)}")
    if options.threads is not None and as_integer(options.threads, 1, _MOST_THREADS) is None:
        raise OptionError(
            f"threads is {options.threads!r}; give an integer from 1 to {_MOST_THREADS}, or None"
            " for all cores"
        )
    ort = import_onnxruntime()
    provider = PROVIDERS[options.device]
    provider_options = dict(options.provider_options or {})
    providers: list[Any] = [(provider, provider_options)]
    if options.device == "cuda":
        load_cuda(ort)
        provider_options |= {"enable_cuda_graph": "1"} if options.capture else {}
        # Computations of shapes belong on the CPU, and are warned of where that is not named
        providers.append(PROVIDERS["cpu"])
    with loading(ort, where, options.device):
        settings, kept = _settings(ort, options)
        session = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            sess_options=settings,
            providers=providers,
            enable_fallback=0,
            disabled_optimizers=_NOT_FOR_CUDA if options.device == "cuda" else None,
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
    settings.intra_op_num_threads = int(options.threads or 0)
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
    for name, size in options.sizes.items():
        settings.add_free_dimension_override_by_name(name, size)
    kept: list[Any] = []
    if options.lent is not None:
        kept.append(options.lent.owner)
        for name, lent in options.lent.tensors.items():
            value, own = lend(ort, lent)
            settings.add_initializer(name, value)
            kept += [value, own]
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

    def run(self, binding: Binding, graph: int | None = None) -> None:
        """Run the graph.

        Args:
            binding: What to read and write.
            graph: Number of the CUDA graph, where runs are captured: the first run of a number
                records what its binding names, and later ones do that again, whatever is bound.
                None is neither recorded nor looked for.

        Raises:
            OutOfMemoryError: There is no room for what the graph computes.
            DeviceError: The device failed, or lacks a kernel.
            RunError: ONNX Runtime refuses what is bound.
        """
        begin = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding.io_binding, self._run_options(graph))
        # ONNX Runtime raises many types, which share no base but Exception
        except Exception as error:
            raise run_error(error, self.where, self.device) from error
        self.run_seconds += time.perf_counter() - begin

    def _run_options(self, graph: int | None) -> Any:
        if self.device != "cuda":
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry(_GRAPH, _NO_GRAPH if graph is None else str(graph))
        return options

    def end_profiling(self) -> Path:
        """End the profiling that the options asked for; gives the trace's file."""
        return Path(self._session.end_profiling())
