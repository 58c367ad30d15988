"""`echoatt share MODEL_DIR STUDENT_DIR`: teacher and sharing plan to a student's directory."""

from __future__ import annotations

import argparse
import json
from typing import Any

from echoatt_cli.export import add_plan_arguments, read_plan

HELP = "apply a sharing plan to a checkpoint and save the student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="the teacher's directory")
    parser.add_argument("student_dir", metavar="STUDENT_DIR", help="a directory to be made")
    add_plan_arguments(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings"
    )


def run(arguments: argparse.Namespace) -> int:
    """Share, save, and say what became smaller."""
    from echoatt_cli.console import console, show_notes, show_plan
    from echoatt_exporter import CheckpointError, SharingPlan, load_shared
    from echoatt_exporter.analyze.footprint import footprint_of
    from echoatt_exporter.share.outline import read_outline
    from echoatt_exporter.share.save import check_new_directory, save_student
    from echoatt_exporter.share.tokenizer_files import refuse_missing_package

    check_new_directory(arguments.student_dir)
    trusted = arguments.trust_remote_code
    outline = read_outline(arguments.model_dir, None, trust_remote_code=trusted)
    if outline.is_student:
        raise CheckpointError(f"{arguments.model_dir}: is a student; share its teacher instead")
    refuse_missing_package(outline.directory)
    student = load_shared(arguments.model_dir, read_plan(arguments), trust_remote_code=trusted)
    notes = save_student(
        student, arguments.student_dir, arguments.model_dir, trust_remote_code=trusted
    )

    footprint = footprint_of(
        student.config.get_text_config(),
        SharingPlan(tuple(student.sources)),
        context=1,
        bytes_per_element=student.dtype.itemsize,
    )
    teacher, now = footprint.teacher, footprint.student
    if arguments.json:
        report: dict[str, Any] = {"student": arguments.student_dir, "sources": student.sources}
        report["notes"] = list(notes)
        for name in ("parameters", "cache_bytes_per_token"):
            report[name] = {"teacher": getattr(teacher, name), "student": getattr(now, name)}
        print(json.dumps(report))
        return 0
    show_notes(notes)
    show_plan(student.sources)
    console.print(
        f"{arguments.student_dir}: {teacher.parameters:,} → {now.parameters:,} parameters"
        f" (-{footprint.parameters_removed_share:.1%}),"
        f" {teacher.cache_bytes_per_token:,} → {now.cache_bytes_per_token:,} cache bytes a token"
        f" (-{1 - now.cache_bytes_per_token / teacher.cache_bytes_per_token:.1%})",
        soft_wrap=True,
        highlight=False,
    )
    return 0
