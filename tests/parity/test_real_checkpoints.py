"""On public checkpoints: the right bundle passes with margin, and faults between passes do not.

What such models have and random ones lack: massive activations, which magnify rounding at some
positions a thousandfold.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from tests.parity import mutants
from tests.parity import pass_mutants as planted
from tests.parity.conftest import specify
from tests.real_checkpoints import Name, real_checkpoint

from echoatt_exporter.graph import export_pipeline, run_pipeline
from echoatt_exporter.graph.run import PassStep
from echoatt_exporter.parity import ParityReport, ReferenceRun, compare, record_reference
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_exporter.trace.tracer import trace_student
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import METADATA_KEY, BundleFile, Manifest, Specification

# Short, because a bundle of half a gigabyte is written for each fault
CONTEXT = 40
CASES = ("prefill by 13", "decode of 6", "ragged batch")
PLAN = "4:3,5:3,6:3,11:10,12:10,15:14,16:14,20:19,21:19"
HEAD_DIM = 64


@dataclass(frozen=True, eq=False)
class Traced:
    """A shared model's trace, and PyTorch's side of the comparison."""

    model: ir.Model
    specification: Specification
    reference: ReferenceRun


@dataclass(frozen=True)
class Fault:
    """What is planted after the first pass of a name, and the first layer that shows it."""

    after: str
    plant: Callable[[ir.Model], None]
    layer: int


FAULTS = {
    "one layer's scores 1 % too large": Fault(
        "JoinDecode", lambda m: planted.scale_scores(m, 9, 1.01), 9
    ),
    "a mask row dropped": Fault(
        "CommonSubexpressionEliminationPass", lambda m: mutants.drop_mask_row(m, 7, 3), 7
    ),
    # Before, the contract's check refuses it
    "wrong source": Fault("CheckContract", lambda m: planted.use_wrong_source(m, 12, 3), 12),
    "values written one token early": Fault(
        "CheckContract", lambda m: planted.write_one_token_early(m, "present.13.value"), 13
    ),
    "two heads' outputs swapped": Fault(
        "ClearMetadata", lambda m: mutants.swap_output_heads(m, 21, HEAD_DIM), 22
    ),
}


def trace(name: Name, plan: str) -> Traced:
    directory = real_checkpoint(name)
    student = load_shared(directory, plan, dtype=torch.float32)
    specification = specify(student)
    reference = record_reference(
        student, specification, tokenizer_dir=directory, max_context=CONTEXT
    )
    cases = tuple(case for case in reference.cases if case.name in CASES)
    reference = dataclasses.replace(reference, cases=cases)
    return Traced(trace_student(student, specification), specification, reference)


def judge(traced: Traced, fault: Fault | None, folder: Path) -> ParityReport:
    """Run the export's passes on a copy, plant a fault between them, and compare."""
    model = traced.model.clone()
    done: list[str] = []

    def plant(step: PassStep | None) -> None:
        if fault is not None and done and done[-1] == fault.after and done.count(done[-1]) == 1:
            fault.plant(model)
        if step is not None:
            done.append(step.name)

    run_pipeline(model, export_pipeline(traced.specification), plant)
    plant(None)
    path = folder / "model.onnx"
    weights = BundleFile(name="model.onnx.data", role="weights", bytes=None, sha256=None)
    manifest = Manifest(exporter_version="0", specification=traced.specification, files=(weights,))
    model.metadata_props[METADATA_KEY] = manifest.to_json()
    ir.save(model, path, external_data=weights.name)
    try:
        return compare(traced.reference, Bundle.open(path))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def smollm2() -> Traced:
    return trace("smollm2", PLAN)


def test_a_right_bundle_passes_with_margin(smollm2: Traced, tmp_path: Path) -> None:
    report = judge(smollm2, None, tmp_path)

    assert report.passed, report.to_dict()
    assert tuple(case.name for case in report.cases) == CASES
    assert report.worst.excess < 0.25


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_between_passes_is_caught(smollm2: Traced, name: str, tmp_path: Path) -> None:
    report = judge(smollm2, FAULTS[name], tmp_path)

    assert not report.passed
    assert report.worst.excess > 5
    assert report.first_diverging_layer == FAULTS[name].layer
