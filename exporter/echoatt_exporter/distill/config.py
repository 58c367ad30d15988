"""Everything that can be set of a healing run, in one object that can also be a YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import yaml

from echoatt_exporter.errors import TrainingError

KlDirection = Literal["student_teacher", "teacher_student"]
Scheduler = Literal["cosine", "linear", "constant"]
TrainingDtype = Literal["fp32", "bf16"]
AttentionChoice = Literal["auto", "materialized", "recomputed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """How a student is healed; the defaults are the paper's (EchoAtt, arXiv 2409.14595, "Adjust").

    Attributes:
        length: Tokens of a row; never more than the model's context.
        batch_size: Rows of a process in one forward pass.
        gradient_accumulation: Forward passes of a process in one step.
        stage1_steps: Optimiser steps of stage 1 (distillation); 0 leaves the stage out. Without
            steps and tokens the two stages together read the text once.
        stage1_tokens: The same in tokens, rounded up to whole steps.
        stage2_steps: Optimiser steps of stage 2 (cross-entropy on the text); 0 leaves it out.
            Without steps and tokens a quarter of stage 1.
        stage2_tokens: The same in tokens, rounded up to whole steps.
        block_weight: Weight of the mean squared error of the block outputs in stage 1.
        kl_weight: Weight of the KL divergence between student and teacher in stage 1.
        label_weight: Weight of the cross-entropy to the teacher's most probable token in stage 1.
        temperature: Divides both models' logits in the KL, which is then multiplied by its square
            so that gradients keep their size.
        kl_direction: `student_teacher` is KL(student ‖ teacher), the paper's; `teacher_student`
            is KL(teacher ‖ student).
        learning_rate: AdamW's at the end of the warm-up.
        stage2_learning_rate: The same for stage 2; left out, as in stage 1.
        scheduler: How the learning rate falls after the warm-up.
        warmup: Share of a stage's steps in which the learning rate rises from 0.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: A gradient with a greater norm is scaled down to it; 0 for no limit.
        dtype: `bf16` computes in bfloat16 with weights and optimiser in float32.
        attention: How followers get their probabilities: kept from the source (`materialized`),
            computed again by fused attention (`recomputed`), or whichever is faster (`auto`).
        gradient_checkpointing: Compute layers again in the backward pass instead of keeping them.
        seed: Of the order of the rows and of dropout.
        log_steps: Steps between two lines of the log.
        save_steps: Steps between two checkpoints; a multiple of `log_steps`.
        keep_checkpoints: Checkpoints kept of a stage.
    """

    length: int = 2048
    batch_size: int = 8
    gradient_accumulation: int = 1
    stage1_steps: int | None = None
    stage1_tokens: int | None = None
    stage2_steps: int | None = None
    stage2_tokens: int | None = None
    block_weight: float = 0.25
    kl_weight: float = 0.25
    label_weight: float = 0.5
    temperature: float = 1.0
    kl_direction: KlDirection = "student_teacher"
    learning_rate: float = 1e-4
    stage2_learning_rate: float | None = None
    scheduler: Scheduler = "cosine"
    warmup: float = 0.005
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: TrainingDtype = "fp32"
    attention: AttentionChoice = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_steps: int = 10
    save_steps: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if faults := _faults(self):
            raise TrainingError(f"the training configuration is wrong: {'; '.join(faults)}")

    @classmethod
    def of(cls, values: Mapping[str, Any], origin: str = "the training configuration") -> Self:
        """A configuration from names and values, as in a YAML file.

        Args:
            values: By the names of the attributes; what is left out keeps its default.
            origin: What errors call it, such as the file's name.

        Raises:
            TrainingError: Unknown names, values of the wrong type or out of range; names every
                fault at once.
        """
        hints = get_type_hints(cls)
        faults = [f"{name!r} is not an option" for name in values if name not in hints]
        known = {}
        for name, value in values.items():
            if name in hints:
                try:
                    known[name] = _typed(value, hints[name])
                except TypeError as error:
                    faults.append(f"{name} must be {error}, not {value!r}")
        # Values that have their type are judged too, so that one run shows everything
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        judged = object.__new__(cls)
        for name, value in (defaults | known).items():
            object.__setattr__(judged, name, value)
        faults += _faults(judged)
        if faults:
            raise TrainingError(f"{origin}: {'; '.join(faults)}")
        return cls(**known)

    @staticmethod
    def read_yaml(path: str | Path) -> dict[str, Any]:
        """The names and values in a YAML file, not yet judged.

        Raises:
            TrainingError: The file cannot be read, or is not a YAML mapping.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path}: cannot be read ({error})") from error
        except yaml.YAMLError as error:
            raise TrainingError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise TrainingError(f"{path}: must hold names and values, such as 'length: 512'")
        return {str(name): value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Names and values; `of` reads them back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """A YAML file's text; `read_yaml` and `of` read it back."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text


def _typed(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it.

    Raises:
        TypeError: It is of another type; the message says which one is wanted.
    """
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TypeError(f"one of {', '.join(get_args(hint))}")
        return value
    if hint is float:
        # YAML 1.1 reads 1e-4, without a point, as text
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise TypeError("a number") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("a number")
        return float(value)
    if type(value) is not hint:
        raise TypeError("true or false" if hint is bool else "a whole number")
    return value


def _faults(config: DistillConfig) -> list[str]:
    """Everything that is out of range, each fault a phrase."""
    found = []
    for name, least in (
        ("length", 2),
        ("batch_size", 1),
        ("gradient_accumulation", 1),
        ("stage1_steps", 0),
        ("stage1_tokens", 0),
        ("stage2_steps", 0),
        ("stage2_tokens", 0),
        ("seed", 0),
        ("log_steps", 1),
        ("save_steps", 1),
        ("keep_checkpoints", 1),
        ("block_weight", 0),
        ("kl_weight", 0),
        ("label_weight", 0),
        ("weight_decay", 0),
        ("max_grad_norm", 0),
    ):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            found.append(f"{name} is {value}, must be {least} or more")
    for name in ("temperature", "learning_rate", "stage2_learning_rate"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            found.append(f"{name} is {value}, must be more than 0")
    if not 0 <= config.warmup < 1:
        found.append(f"warmup is {config.warmup}, must be a share from 0 to below 1")
    found += [
        f"{stage}_steps and {stage}_tokens are both given; leave one out"
        for stage in ("stage1", "stage2")
        if None not in (getattr(config, f"{stage}_steps"), getattr(config, f"{stage}_tokens"))
    ]
    if config.block_weight == config.kl_weight == config.label_weight == 0:
        found.append("block_weight, kl_weight and label_weight are all 0; stage 1 has no loss")
    if config.log_steps > 0 and config.save_steps % config.log_steps:
        # A log line is about the steps since the last one; a run that starts in between from a
        # checkpoint would log other numbers than one that was never stopped
        found.append(
            f"save_steps is {config.save_steps}, must be a multiple of log_steps"
            f" ({config.log_steps})"
        )
    return found
