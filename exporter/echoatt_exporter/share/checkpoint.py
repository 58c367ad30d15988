"""Teachers and students loaded from their directories, checked.

Nothing is fetched from a hub, no pickle is opened, and no code that lies in a checkpoint runs
unless the caller allows it. A checkpoint is loaded whole or refused: a weight that is absent,
surplus, of the wrong shape or not finite is an error, never a random number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.outline import (
    CheckpointOutline,
    is_student,
    read_outline,
    read_teacher_outline,
)
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_exporter.share.special_tokens import forget_absent_tokens
from echoatt_exporter.share.unfit_checkpoints import (
    refuse_misfits,
    refuse_non_finite,
    refuse_other_modules,
    refuse_stored_as_integers,
    short,
)
from echoatt_exporter.share.weight_files import stored_dtype
from echoatt_runtime.contract import SharingPlan

__all__ = ["load_model", "load_shared", "load_teacher"]


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
    if outline.is_student:
        student: EchoAttForCausalLM = _load(EchoAttForCausalLM, outline, dtype, False)
        return student
    teacher = _load(AutoModelForCausalLM, outline, dtype, trust_remote_code)
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
    outline = read_teacher_outline(path, trust_remote_code=trust_remote_code)
    teacher: PreTrainedModel = _load(AutoModelForCausalLM, outline, dtype, trust_remote_code)
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


def _load(
    model_class: Any, outline: CheckpointOutline, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """Load a model whole or refuse it."""
    directory = outline.directory
    own_dtype = stored_dtype(outline.tensors, directory)
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                directory,
                config=outline.config,
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
    refuse_stored_as_integers(directory, model, outline.tensors)
    refuse_non_finite(directory, model, own_dtype)
    forget_absent_tokens(model.generation_config, outline.architecture.vocab_size)
    return model
