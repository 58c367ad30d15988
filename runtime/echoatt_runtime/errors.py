"""The exceptions of EchoAtt, as one tree.

EchoAttError
├── BundleError                the bundle cannot be used
│   ├── BundleNotFoundError    no file there
│   ├── ForeignModelError      an ONNX file without an EchoAtt manifest
│   ├── NewerFormatError       written by a newer EchoAtt
│   └── DamagedBundleError     a manifest, graph or weight file that is incomplete or inconsistent
├── SpecificationError         a description of a model that contradicts itself
├── PlanError                  a sharing plan that is malformed or does not fit the model
├── OptionError                an option of loading is out of range
├── DeviceError                an unknown device, or one whose provider did not load
├── OutOfMemoryError           no memory left to load a model or to run a step
├── RunError                   ONNX Runtime refuses a step
├── MissingDependencyError     an optional package is not installed
├── PromptError                a prompt that cannot be run (empty, not text)
│   ├── ContextOverflowError   prompt and new tokens do not fit the context
│   └── ChatTemplateError      no chat template, or one that refuses the messages
├── NumericalError             the model computed logits that are not numbers
└── SamplingError              sampling parameters out of range

Every message is one line: what is wrong, where, and what to do.
"""

import re
from typing import ClassVar, Final

# Files name things as long as they like. What is wrong comes first in a message, what to do last.
_LONGEST_BEGINNING: Final = 1600
_LONGEST_END: Final = 400


class EchoAttError(Exception):
    """Base of every error that EchoAtt raises on purpose.

    Its message often has in it what a file or a library says. Whatever that is, the message is one
    line of bounded length that a terminal can show.

    Attributes:
        exit_code: What a command ends with when this error ends it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_bounded_line(message))


class BundleError(EchoAttError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError):
    """There is no model file at the given path."""


class ForeignModelError(BundleError):
    """The ONNX file carries no EchoAtt manifest."""


class NewerFormatError(BundleError):
    """The bundle's format is newer than this runtime."""


class DamagedBundleError(BundleError):
    """The manifest, the graph or the weight file is incomplete or inconsistent."""


class PlanError(EchoAttError):
    """A sharing plan is malformed, or does not fit the model."""


class SpecificationError(EchoAttError):
    """A description of what is to be built contradicts itself."""


class OptionError(EchoAttError):
    """An option of loading a model is out of range."""


class DeviceError(EchoAttError):
    """The device is unknown, or its execution provider did not load."""


class OutOfMemoryError(EchoAttError):
    """There is no memory left to load a model or to run a step."""


class RunError(EchoAttError):
    """ONNX Runtime refuses a step."""


class MissingDependencyError(EchoAttError):
    """An optional package is not installed."""


class PromptError(EchoAttError):
    """A prompt cannot be run."""


class ContextOverflowError(PromptError):
    """Prompt and new tokens do not fit the model's context."""


class ChatTemplateError(PromptError):
    """The checkpoint has no chat template, or its template refuses the messages."""


class NumericalError(EchoAttError):
    """The model computed logits that are NaN or infinite."""


class SamplingError(EchoAttError):
    """Sampling parameters are out of range."""


def one_line(error: BaseException) -> str:
    """The error's message with all white space collapsed."""
    return " ".join(str(error).split())


def _bounded_line(text: str) -> str:
    """A text without line breaks and control characters, its middle left out where it is long."""
    if len(text) > _LONGEST_BEGINNING + _LONGEST_END:
        text = f"{text[:_LONGEST_BEGINNING]} ... {text[-_LONGEST_END:]}"
    # Blanks stay as they are: paths have them
    text = re.sub(r"\s*[^\S ]\s*", " ", text).strip()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
