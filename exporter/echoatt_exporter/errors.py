"""The exporter's exceptions; all derive from `echoatt_runtime.errors.EchoAttError`.

EchoAttError
├── UnsupportedModelError    a model that EchoAtt cannot share or export
├── CheckpointError          a model directory that cannot be read as it should
├── ExportError              an export that cannot go on
│   ├── OutputExistsError    the output is there already
│   ├── PropertyError        a graph that lacks what a pass requires or ensures
│   └── ContractError        a graph that breaks the graph contract
├── ParityError              bundle and PyTorch disagree
├── TextError                texts that cannot be read, or too little text
├── AnalysisError            an analysis that cannot be made as asked
├── TrainingError            a training run that cannot start or go on
│   └── DivergedError        the loss is not a number
└── BenchError               a bench that cannot be made as asked, or an engine that failed

Every message is one line: what is wrong, where, and what to do.
"""

from typing import ClassVar

from echoatt_runtime.errors import EchoAttError


class UnsupportedModelError(EchoAttError):
    """The model is of a kind that EchoAtt cannot share or export."""


class CheckpointError(EchoAttError):
    """A model directory is incomplete, inconsistent or unsafe to load."""


class ExportError(EchoAttError):
    """An export cannot go on."""


class OutputExistsError(ExportError):
    """The output exists and overwriting it was not asked for."""


class PropertyError(ExportError):
    """A graph lacks a property that a pass requires, or that it should have after the pass."""


class ContractError(ExportError):
    """A graph breaks the graph contract."""


class ParityError(EchoAttError):
    """The bundle's numbers differ from PyTorch's by more than the stated tolerance."""

    exit_code: ClassVar[int] = 1


class TextError(EchoAttError):
    """Texts cannot be read, or there is too little text."""


class AnalysisError(EchoAttError):
    """An analysis cannot be made as asked."""


class TrainingError(EchoAttError):
    """A training run cannot start or go on."""


class DivergedError(TrainingError):
    """The loss or a gradient is not a number."""


class BenchError(EchoAttError):
    """A bench cannot be made as asked, or an engine failed."""
