"""Runs EchoAtt bundles: decoders whose layers share attention probabilities. No torch needed.

    from echoatt_runtime import EchoModel, SamplingParams

    model = EchoModel.load("out.onnx")
    for piece in model.stream("Once upon a time", SamplingParams(max_new_tokens=100)):
        print(piece.text, end="", flush=True)

The layers below are public too: `contract`, `bundle`, `cache`, `executor`, `generation`, `text`,
`measures` and `ort`.
"""

from importlib.metadata import version

from echoatt_runtime.contract import Manifest, SharingPlan, Specification
from echoatt_runtime.errors import (
    BundleError,
    BundleNotFoundError,
    ChatTemplateError,
    ContextOverflowError,
    DamagedBundleError,
    DeviceError,
    EchoAttError,
    ForeignModelError,
    MissingDependencyError,
    NewerFormatError,
    NumericalError,
    OptionError,
    OutOfMemoryError,
    PlanError,
    PromptError,
    RunError,
    SamplingError,
    SpecificationError,
)
from echoatt_runtime.model import EchoModel
from echoatt_runtime.results import GenerationResult, TextPiece, Timings
from echoatt_runtime.sampling import SamplingParams

__version__ = version("echoatt")

__all__ = [
    "BundleError",
    "BundleNotFoundError",
    "ChatTemplateError",
    "ContextOverflowError",
    "DamagedBundleError",
    "DeviceError",
    "EchoAttError",
    "EchoModel",
    "ForeignModelError",
    "GenerationResult",
    "Manifest",
    "MissingDependencyError",
    "NewerFormatError",
    "NumericalError",
    "OptionError",
    "OutOfMemoryError",
    "PlanError",
    "PromptError",
    "RunError",
    "SamplingError",
    "SamplingParams",
    "SharingPlan",
    "Specification",
    "SpecificationError",
    "TextPiece",
    "Timings",
    "__version__",
]
