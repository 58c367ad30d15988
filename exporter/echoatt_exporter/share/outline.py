"""What a checkpoint is and what a plan makes of it, known without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from echoatt_exporter.architecture import DecoderArchitecture, architecture_of
from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.families import FAMILIES, family_of
from echoatt_exporter.share.configuration_echoatt import EchoAttConfig
from echoatt_exporter.share.model_directory import CONFIG, model_directory
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_exporter.share.special_tokens import forget_absent_tokens
from echoatt_exporter.share.unfit_checkpoints import (
    refuse_foreign,
    refuse_other_heads,
    refuse_quantised,
    short,
)
from echoatt_exporter.share.weight_files import (
    StoredTensor,
    read_json_object,
    stored_dtype,
    stored_tensors,
    weight_files,
)
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import PlanError


def is_student(path: str | Path) -> bool:
    """Whether a model directory is a student's.

    Raises:
        CheckpointError: It is not a model directory.
    """
    return _is_students(read_json_object(model_directory(path) / CONFIG))


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
    directory = model_directory(path)
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


def read_teacher_outline(path: str | Path, *, trust_remote_code: bool = False) -> CheckpointOutline:
    """The same of a teacher, unshared.

    Args:
        path: As in `read_outline`.
        trust_remote_code: As in `read_outline`.

    Raises:
        CheckpointError: As in `read_outline`; or it is a student's.
        UnsupportedModelError: As in `read_outline`.
    """
    outline = read_outline(path, None, trust_remote_code=trust_remote_code)
    if outline.is_student:
        raise CheckpointError(f"{outline.directory}: is a student; a teacher is needed here")
    return outline


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
    refuse_other_heads(directory, raw)
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
    if config.model_type in FAMILIES:
        _correct(config)
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
    if text_config.model_type in FAMILIES:
        _correct(text_config)
        forget_absent_tokens(config, text_config.vocab_size)
    try:
        architecture_of(text_config).validate_plan(plan)
    except PlanError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    # By what is known here, whatever the file says: older students' files say nothing
    config.layout = family_of(text_config).student_layout(text_config)
    return plan, config


def _correct(config: PreTrainedConfig) -> None:
    """Take from a decoder's configuration, in place, what has no meaning and would do harm."""
    family_of(config).attention_kinds.forget_unread(config)
    forget_absent_tokens(config, config.vocab_size)
