"""Bundles whose plan moves the followers' heads: what they say, and what they compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny_models import build_tiny_model

from echoatt_exporter import PlanError, SharingPlan, check_parity, export_bundle, load_student

PLAN = SharingPlan((0, 1, 1), ((), (), (3, 2, 0, 1)))


def test_bundle_of_a_teacher_remembers_the_order_and_one_of_a_student_needs_none(
    tmp_path: Path,
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    build_tiny_model("llama", num_hidden_layers=3).save_pretrained(teacher)
    load_student(teacher, PLAN).save_pretrained(student)

    of_teacher = export_bundle(teacher, tmp_path / "a", PLAN)
    assert of_teacher.manifest.head_orders == PLAN.head_orders
    assert of_teacher.parity is not None
    assert of_teacher.parity.passed
    for directory in (teacher, student):
        assert check_parity(directory, of_teacher.model, max_context=20).passed
    for other in (SharingPlan(PLAN.sources), "2:1"):
        with pytest.raises(PlanError, match=r"heads in another order.*leave the plan out"):
            check_parity(teacher, of_teacher.model, other)

    of_student = export_bundle(student, tmp_path / "b", PLAN, verify=False)
    assert of_student.manifest.head_orders == ()
    assert check_parity(student, of_student.model, PLAN, max_context=20).passed
    # Without the order the teacher is another model
    assert not check_parity(teacher, of_student.model, max_context=20).passed
