"""Whether a teacher, a student and a tokenizer belong together."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from echoatt_exporter.errors import CheckpointError


def check_pair(
    teacher_dir: str | Path, teacher: PreTrainedConfig, student: PreTrainedConfig
) -> None:
    """Refuse a teacher that the student is not made from.

    Raises:
        CheckpointError: They differ in a size that is compared.
    """
    faults = [
        f"{name} {getattr(teacher, name)} and {getattr(student, name)}"
        for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        if getattr(teacher, name) != getattr(student, name)
    ]
    if faults:
        raise CheckpointError(
            f"{teacher_dir} is not this student's teacher: they have {'; '.join(faults)}"
        )


def check_tokens(student_dir: str | Path, rows: torch.Tensor, vocab_size: int) -> None:
    """Refuse a tokenizer that is another model's.

    Raises:
        CheckpointError: It gives tokens that the model does not have.
    """
    if rows.numel() and (largest := int(rows.max())) >= vocab_size:
        raise CheckpointError(
            f"{student_dir}: its tokenizer gives token {largest} for this text and the model has"
            f" {vocab_size}; it belongs to another model"
        )
