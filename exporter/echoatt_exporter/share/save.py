"""A student as a Hugging Face directory."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from echoatt_exporter.errors import ExportError, OutputExistsError
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_exporter.share.tokenizer_files import save_tokenizer
from echoatt_exporter.share.unfit_checkpoints import short


def save_student(
    student: EchoAttForCausalLM,
    directory: str | Path,
    source_dir: str | Path,
    *,
    trust_remote_code: bool = False,
) -> Sequence[str]:
    """Write a student as a Hugging Face directory with everything that `generate` needs.

    The code of the student's class lies in it too, so that it loads in plain transformers with
    `trust_remote_code=True`. The directory appears whole or not at all: it is written beside its
    place and then renamed.

    Args:
        student: The student.
        directory: Where to; must not exist, or be empty.
        source_dir: The teacher's directory, for tokenizer and chat template.
        trust_remote_code: Allow the tokenizer's own Python code in `source_dir` to run.

    Returns:
        What a user should know of the tokenizer, in a line each; often nothing.

    Raises:
        OutputExistsError: `directory` is there already.
        CheckpointError: The tokenizer in `source_dir` cannot be loaded.
        ExportError: Writing failed, for want of space for one.
    """
    target, source = Path(directory), Path(source_dir)
    check_new_directory(target)
    partial = target.absolute().parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.mkdir(parents=True)
        with quiet_transformers():
            _save_model(student, partial)
        notes = save_tokenizer(source, partial, trust_remote_code=trust_remote_code)
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{target}: cannot write the student ({short(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def check_new_directory(directory: str | Path) -> None:
    """Refuse a directory that something is in, as `save_student` does.

    Raises:
        OutputExistsError: `directory` is a file, or a directory that is not empty.
    """
    target = Path(directory)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputExistsError(f"{target}: exists; remove it, or name another directory")


def _save_model(student: EchoAttForCausalLM, directory: Path) -> None:
    generation_config = student.generation_config
    # transformers refuses to save an inconsistent generation config. Published ones often are
    # (temperature without do_sample), and that is no reason not to save weights.
    student.generation_config = GenerationConfig()
    try:
        student.save_pretrained(directory)
    finally:
        student.generation_config = generation_config
    generation_config.to_json_file(directory / "generation_config.json")
