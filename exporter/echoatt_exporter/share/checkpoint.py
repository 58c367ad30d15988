"""Teachers and students as directories: load, check, save.

Nothing is fetched from a hub, no pickle is opened, and no code that lies in a checkpoint runs
unless the caller allows it. A checkpoint is loaded whole or refused: a weight that is absent,
surplus, of the wrong shape or not finite is an error, never a random number.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.utils.save_utils import maybe_save_preprocessors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from echoatt_exporter.architecture import DecoderArchitecture, architecture_of
from echoatt_exporter.errors import CheckpointError, ExportError, OutputExistsError
from echoatt_exporter.families import FAMILIES, family_of
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.configuration_echoatt import EchoAttConfig
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.unfit_checkpoints import (
    CONFIG,
    refuse_foreign,
    refuse_misfits,
    refuse_non_finite,
    refuse_other_modules,
    refuse_oversized,
    refuse_quantised,
    refuse_stored_as_integers,
    short,
)
from echoatt_exporter.share.weight_files import (
    StoredTensor,
    checkpoint_digest,
    read_json_object,
    stored_dtype,
    stored_tensors,
    weight_files,
)
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import PlanError

__all__ = [
    "CheckpointOutline",
    "check_new_directory",
    "checkpoint_digest",
    "is_student",
    "load_model",
    "load_shared",
    "load_teacher",
    "read_outline",
    "save_student",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# transformers' verbosity and progress bars belong to the whole process
_QUIET_LOCK = threading.RLock()


def is_student(path: str | Path) -> bool:
    """Whether a model directory is a student's.

    Raises:
        CheckpointError: It is not a model directory.
    """
    return _is_students(read_json_object(_directory(path) / CONFIG))


@dataclass(frozen=True, slots=True)
class CheckpointOutline:
    """What a checkpoint is, known without reading its weights.

    Attributes:
        directory: Where it lies.
        config: Its configuration.
        plan: The plan to apply to a teacher, or a student's own.
        is_student: Whether it is a student's.
        tensors: Its stored tensors by name.
    """

    directory: Path
    config: PreTrainedConfig
    plan: SharingPlan
    is_student: bool
    tensors: Mapping[str, StoredTensor]

    @property
    def text_config(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        found: PreTrainedConfig = self.config.get_text_config()
        return found

    @property
    def architecture(self) -> DecoderArchitecture:
        """The decoder's shape."""
        return architecture_of(self.text_config)


def read_outline(
    path: str | Path, plan: SharingPlan | str | None, *, trust_remote_code: bool = False
) -> CheckpointOutline:
    """Check all of a checkpoint and of a plan for it that can be checked without its weights.

    Args:
        path: As in `load_shared`, and so are the others.
        plan: The plan.
        trust_remote_code: Allow Python code in the directory to run.

    Raises:
        CheckpointError: As in `load_shared`.
        UnsupportedModelError: As in `load_shared`.
        PlanError: As in `load_shared`.
    """
    directory = _directory(path)
    raw = read_json_object(directory / CONFIG)
    student = _is_students(raw)
    config: PreTrainedConfig
    if student:
        own, config = _student_config(directory, raw)
        asked = own if plan is None else SharingPlan.of(plan, own.num_layers)
        # Where its plan moved heads, they lie that way in its weights
        if asked.sources != own.sources:
            raise PlanError(
                f"{directory} is a student with the plan {list(own.sources)}, not"
                f" {list(asked.sources)}; leave the plan out, or start from the teacher"
            )
        plan = own
    else:
        config = _teacher_config(directory, raw, trust_remote_code)
        architecture = architecture_of(config)
        count = architecture.num_layers
        plan = SharingPlan.unshared(count) if plan is None else SharingPlan.of(plan, count)
        architecture.validate_plan(plan)
    tensors = stored_tensors(weight_files(directory))
    stored_dtype(tensors, directory)
    return CheckpointOutline(directory, config, plan, student, tensors)


def load_shared(
    path: str | Path,
    plan: SharingPlan | str | None,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> EchoAttForCausalLM:
    """Load a student, or a teacher and apply a sharing plan to it.

    Args:
        path: A student's directory, or a Hugging Face directory of a supported family.
        plan: For a teacher the plan to apply, or its `follower:source` pairs; None for an
            unshared student. A student has its own plan: then None, or the same one.
        dtype: Element type of the weights; None keeps the one that most of them are stored in.
        trust_remote_code: Allow Python code in the directory to run.

    Returns:
        The student on the CPU, in evaluation mode. Weights that keep their dtype stay
        memory-mapped.

    Raises:
        CheckpointError: The directory is incomplete, inconsistent or damaged.
        UnsupportedModelError: The model cannot be shared.
        PlanError: The plan does not fit the model, or is not the student's own.
    """
    outline = read_outline(path, plan, trust_remote_code=trust_remote_code)
    directory, config = outline.directory, outline.config
    if outline.is_student:
        student: EchoAttForCausalLM = _load(EchoAttForCausalLM, directory, config, dtype, False)
        return student
    teacher = _load(AutoModelForCausalLM, directory, config, dtype, trust_remote_code)
    return share_attention(teacher, outline.plan)


def load_teacher(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a decoder of a supported family as transformers has it.

    Args:
        path: A Hugging Face directory.
        dtype: As in `load_shared`.
        trust_remote_code: As in `load_shared`.

    Returns:
        The model for causal LM, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: The directory is incomplete, inconsistent or damaged, or is a student's.
        UnsupportedModelError: The model cannot be shared.
    """
    directory = _directory(path)
    raw = read_json_object(directory / CONFIG)
    if _is_students(raw):
        raise CheckpointError(f"{directory}: is a student; a teacher is needed here")
    config = _teacher_config(directory, raw, trust_remote_code)
    architecture_of(config)
    teacher: PreTrainedModel = _load(
        AutoModelForCausalLM, directory, config, dtype, trust_remote_code
    )
    return teacher


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a student or a teacher, whichever lies in the directory.

    Args:
        path: A model directory.
        dtype: As in `load_shared`.
        trust_remote_code: As in `load_shared`.

    Raises:
        CheckpointError: As in `load_shared`.
        UnsupportedModelError: As in `load_shared`.
    """
    if is_student(path):
        return load_shared(path, None, dtype=dtype)
    return load_teacher(path, dtype=dtype, trust_remote_code=trust_remote_code)


def save_student(
    student: EchoAttForCausalLM,
    directory: str | Path,
    source_dir: str | Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write a student as a Hugging Face directory with everything that `generate` needs.

    The code of the student's class lies in it too, so that it loads in plain transformers with
    `trust_remote_code=True`. The directory appears whole or not at all: it is written beside its
    place and then renamed.

    Args:
        student: The student.
        directory: Where to; must not exist, or be empty.
        source_dir: The teacher's directory, for tokenizer and chat template.
        trust_remote_code: Allow the tokenizer's own Python code in `source_dir` to run.

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
            save_tokenizer(source, partial, trust_remote_code=trust_remote_code)
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{target}: cannot write the student ({short(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def save_tokenizer(source: Path, directory: Path, *, trust_remote_code: bool = False) -> None:
    """Save the tokenizer and chat template in `source`, if there are any, to `directory`.

    Raises:
        CheckpointError: There is a tokenizer, and it cannot be loaded.
    """
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return
    with quiet_transformers():
        maybe_save_preprocessors(source, directory, trust_remote_code=trust_remote_code)
    # optimum saves what loads and passes over what does not
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{source}: its tokenizer cannot be loaded with transformers")


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not directory.exists():
        raise CheckpointError(
            f"{directory}: no such directory; give a local model directory (nothing is downloaded)"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give the directory that holds {CONFIG}")
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory}: no {CONFIG}; not a Hugging Face model directory")
    refuse_oversized(directory)
    return directory


def _is_students(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == EchoAttConfig.model_type


def _teacher_config(
    directory: Path, raw: dict[str, Any], trust_remote_code: bool
) -> PreTrainedConfig:
    """The configuration of a dense decoder that transformers knows, or a reasoned refusal."""
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise CheckpointError(f'{directory / CONFIG}: no "model_type"; not a transformers config')
    refuse_quantised(directory, raw)
    if family not in FAMILIES:
        refuse_foreign(directory, raw, family, trust_remote_code)
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise CheckpointError(
            f"{directory / CONFIG}: not a valid {family} config ({short(error)})"
        ) from error
    return config


def _student_config(directory: Path, raw: dict[str, Any]) -> tuple[SharingPlan, EchoAttConfig]:
    """A student's plan and configuration, checked against each other."""
    origin = directory / CONFIG
    sources, text = raw.get("sources"), raw.get("text_config")
    if not isinstance(sources, list) or not all(type(source) is int for source in sources):
        raise CheckpointError(f'{origin}: "sources" must be a list of layer numbers, one a layer')
    if not isinstance(text, dict) or "model_type" not in text:
        raise CheckpointError(f'{origin}: "text_config" must be the teacher\'s configuration')
    try:
        with quiet_transformers():
            config = EchoAttConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{origin}: not a valid student config ({short(error)})") from error
    plan = SharingPlan(tuple(sources))
    text_config = config.get_text_config()
    try:
        architecture_of(text_config).validate_plan(plan)
    except PlanError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    # By what is known here, whatever the file says: older students' files say nothing
    config.layout = family_of(text_config).student_layout(text_config)
    return plan, config


def _load(
    model_class: Any,
    directory: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> Any:
    """Load a model whole or refuse it."""
    tensors = stored_tensors(weight_files(directory))
    own_dtype = stored_dtype(tensors, directory)
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                directory,
                config=config,
                dtype=dtype or own_dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                # Collected rather than raised one by one, and raised below
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"{directory}: cannot be loaded ({short(error)})") from error
    if not isinstance(model, EchoAttForCausalLM):
        refuse_other_modules(directory, model)
    refuse_misfits(directory, info)
    refuse_stored_as_integers(directory, model, tensors)
    refuse_non_finite(directory, model, own_dtype)
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars, and restore both."""
    with _QUIET_LOCK:
        verbosity = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
