"""Bundles whose plan moves the followers' heads: what they say, and what they compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny_models import build_tiny_model

from echoatt_exporter import PlanError, SharingPlan, check_parity, export_bundle, load_shared

PLAN = SharingPlan((0, 1, 1), ((), (), (3, 2, 0, 1)))


def test_a_bundle_remembers_the_order_that_its_teacher_was_given(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    build_tiny_model("llama", num_hidden_layers=3).save_pretrained(teacher)
    load_shared(teacher, PLAN).save_pretrained(student)

    report = export_bundle(teacher, tmp_path / "bundle", PLAN)
    assert report.manifest.specification.plan == PLAN
    assert report.parity is not None
    assert report.parity.passed
    for directory, plan in ((teacher, None), (teacher, PLAN), (student, None), (student, PLAN)):
        assert check_parity(directory, report.model, plan, max_context=20).passed
    for other in (SharingPlan(PLAN.sources), "2:1"):
        with pytest.raises(PlanError, match=r"heads in another order.*leave the plan out"):
            check_parity(teacher, report.model, other)

    # A bundle made from the student says nothing of an order, and has it in its weights as well
    exported = export_bundle(student, tmp_path / "of_student", PLAN, verify=False)
    assert exported.manifest.specification.plan == SharingPlan(PLAN.sources)
    assert check_parity(student, exported.model, max_context=20).passed
    assert check_parity(teacher, exported.model, PLAN, max_context=20).passed
    assert not check_parity(teacher, exported.model, max_context=20).passed
