"""Build-time side of EchoAtt: share, export and verify models.

Importing this package makes students known to transformers: `AutoConfig` and
`AutoModelForCausalLM` then load a student's directory.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForCausalLM

from echoatt_exporter.errors import (
    AnalysisError,
    CheckpointError,
    ContractError,
    DivergedError,
    ExportError,
    OutputExistsError,
    ParityError,
    TextError,
    TrainingError,
    UnsupportedModelError,
)
from echoatt_exporter.export import export_bundle
from echoatt_exporter.export_report import ExportReport
from echoatt_exporter.parity import ParityReport, assert_parity, check_parity
from echoatt_exporter.quantise.quantise import RoundingChoice
from echoatt_exporter.rewrite import rewrite_bundle
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.checkpoint import load_model, load_shared, load_teacher
from echoatt_exporter.share.configuration_echoatt import EchoAttConfig
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.save import save_student
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import PlanError

__all__ = [
    "AnalysisError",
    "CheckpointError",
    "ContractError",
    "DivergedError",
    "EchoAttConfig",
    "EchoAttForCausalLM",
    "ExportError",
    "ExportReport",
    "OutputExistsError",
    "ParityError",
    "ParityReport",
    "PlanError",
    "RoundingChoice",
    "SharingPlan",
    "TextError",
    "TrainingError",
    "UnsupportedModelError",
    "__version__",
    "assert_parity",
    "check_parity",
    "export_bundle",
    "load_model",
    "load_shared",
    "load_teacher",
    "rewrite_bundle",
    "save_student",
    "share_attention",
]

__version__ = version("echoatt")

AutoConfig.register(EchoAttConfig.model_type, EchoAttConfig)
AutoModelForCausalLM.register(EchoAttConfig, EchoAttForCausalLM)
# Whatever saves a student saves its code along, so that it loads where EchoAtt is not installed
EchoAttConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
EchoAttForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
