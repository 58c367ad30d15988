"""PyTorch against the bundle: does the graph compute what the student computes?"""

from echoatt_exporter.parity.cases import verified_context
from echoatt_exporter.parity.check import assert_parity, check_parity
from echoatt_exporter.parity.compare import compare
from echoatt_exporter.parity.float16_range import check_float16_range
from echoatt_exporter.parity.reference import (
    ReferenceRun,
    UnroundedRun,
    record_reference,
    record_unrounded,
)
from echoatt_exporter.parity.report import CaseReport, Difference, ParityReport
from echoatt_exporter.parity.table import format_report
from echoatt_exporter.parity.tolerance import Tolerance

__all__ = [
    "CaseReport",
    "Difference",
    "ParityReport",
    "ReferenceRun",
    "Tolerance",
    "UnroundedRun",
    "assert_parity",
    "check_float16_range",
    "check_parity",
    "compare",
    "format_report",
    "record_reference",
    "record_unrounded",
    "verified_context",
]
