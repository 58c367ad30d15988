"""The losses on `transformers.Trainer`, which brings everything else of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.data import TokenRows
from echoatt_exporter.distill.healing_student import HealingStudent, block_outputs
from echoatt_exporter.distill.losses import Target
from echoatt_exporter.errors import DivergedError
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the two stages of a run.

    Attributes:
        number: 1 (distillation) or 2 (cross-entropy on the text).
        steps: Optimiser steps.
        learning_rate: At the end of the warm-up.
    """

    number: Literal[1, 2]
    steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, after each step.

    Attributes:
        stage: The stage's number.
        step: Steps done in it.
        steps: Steps of it.
        tokens: Tokens that a step takes.
    """

    stage: int
    step: int
    steps: int
    tokens: int


def training_arguments(config: DistillConfig, stage: Stage, directory: Path) -> TrainingArguments:
    """A stage in transformers' words.

    Args:
        config: What the user chose; the rest is transformers' default.
        stage: The stage.
        directory: Gets the stage's checkpoints.
    """
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=stage.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=_SCHEDULERS[config.scheduler],
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bf16",
        use_cpu=not on_gpu,
        activation_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        # Every parameter has a gradient, and looking for others costs a walk over the graph
        ddp_find_unused_parameters=False,
        # A loss that is no number ends the run here
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="critical",
        log_level_replica="critical",
    )
    if arguments.n_gpu > 1:  # one process drives one GPU; torchrun starts more
        arguments._n_gpu = 1  # noqa: SLF001  # no argument sets it
    return arguments


class HealingTrainer(Trainer):
    """Trains a student through one stage.

    Args:
        student: The student, to be trained.
        teacher: The teacher as an unshared student in evaluation mode, in stage 1; only its device
            changes.
        arguments: See `training_arguments`.
        stage: The stage.
        rows: Its data.
        on_log: Called in the main process with each line of the log.
        on_step: Called in the main process after each step.
    """

    def __init__(
        self,
        student: HealingStudent,
        teacher: EchoAttForCausalLM | None,
        arguments: TrainingArguments,
        stage: Stage,
        rows: TokenRows,
        *,
        on_log: Callable[[dict[str, Any]], None],
        on_step: Callable[[Progress], None],
    ) -> None:
        self.stage = stage
        self.tokens_a_step = tokens_a_step(arguments, rows.rows.shape[1])
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=rows,
            callbacks=[_Steps(self, on_step)],
        )
        self.remove_callback(PrinterCallback)
        self.teacher = teacher
        if teacher is not None:
            nn.Module.to(teacher, arguments.device)
        self._on_log = on_log
        self._parts: list[dict[str, torch.Tensor]] = []
        self.resumed_step = 0
        self._logged = (0, 0.0)

    def start_clock(self, step: int) -> None:
        """Count tokens/s from here, where `step` steps are done."""
        self.resumed_step = step
        self._logged = (step, time.perf_counter())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002 - as in transformers
    ) -> Any:
        """The stage's loss, a mean over the batch's tokens.

        Raises:
            DivergedError: It is not a finite number.
        """
        if self.teacher is None:
            parts = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        else:
            parts = model(input_ids=inputs["input_ids"], target=self._target(inputs["input_ids"]))
        loss = parts["loss"]
        self._parts.append({name: part.detach() for name, part in parts.items()})
        if not torch.isfinite(loss):
            raise DivergedError(f"{self._where()}: {self._culprit(parts)}")
        return (loss, parts) if return_outputs else loss

    @torch.no_grad()
    def _target(self, input_ids: torch.Tensor) -> Target:
        assert self.teacher is not None  # noqa: S101 - the caller's branch
        outputs = block_outputs(self.teacher.forward, self.teacher, input_ids)
        return Target(outputs, head_of(self.teacher.decoder))

    def _where(self) -> str:
        return f"stage {self.stage.number}, step {self.state.global_step + 1}"

    def _culprit(self, parts: dict[str, torch.Tensor]) -> str:
        """What is not a number, as early in its way as can be told."""
        advice = "lower the learning rate, or look at the data of this step"
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weights of {name} are no longer finite; {advice}"
        broken = [f"{n} is {p.item()}" for n, p in parts.items() if not torch.isfinite(p)]
        return f"the loss is not a finite number ({', '.join(broken)}); {advice}"

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._check_gradients(model)
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._check_gradients(model)
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _check_gradients(self, model: nn.Module) -> None:
        """Refuse gradients that are not finite, before clipping spreads them over all parameters.

        Raises:
            DivergedError: Names the first parameter, in the model's order.
        """
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        if torch.isfinite(nn.utils.get_total_norm([gradient for _, gradient in named])):
            return
        for name, gradient in named:
            if not torch.isfinite(gradient).all():
                raise DivergedError(
                    f"{self._where()}: the gradient of {name} is not finite; lower the learning"
                    " rate, or set max_grad_norm"
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, tokens and speed to what transformers logs."""
        if "loss" not in logs:  # the summary at the end
            return
        step, now = self.state.global_step, time.perf_counter()
        sums = torch.stack([torch.stack([*parts.values()]).double() for parts in self._parts])
        means = self.accelerator.reduce(sums.mean(0).float(), "mean").tolist()
        names = self._parts[0].keys()
        self._parts.clear()
        last_step, then = self._logged
        line: dict[str, Any] = {
            "stage": self.stage.number,
            "step": step,
            "tokens": step * self.tokens_a_step,
            **dict(zip(names, means, strict=True)),
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs.get("grad_norm", math.nan)),
            "tokens_per_second": (step - last_step) * self.tokens_a_step / (now - then),
        }
        self._logged = (step, now)
        super().log(dict(line), start_time)
        if self.is_world_process_zero():
            self._on_log(line)


class _Steps(TrainerCallback):
    """Tells of each step; sees to the last one."""

    def __init__(self, trainer: HealingTrainer, on_step: Callable[[Progress], None]) -> None:
        self._trainer = trainer
        self._on_step = on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The clock starts, at the step that was resumed from."""
        self._trainer.start_clock(state.global_step)
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """The last step is logged, and not saved: the stage's student is, which is more."""
        self._tell(state)
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = False
        return control

    def _tell(self, state: Any) -> None:
        if state.is_world_process_zero:
            stage, tokens = self._trainer.stage, self._trainer.tokens_a_step
            self._on_step(Progress(stage.number, state.global_step, stage.steps, tokens))


def tokens_a_step(arguments: TrainingArguments, length: int) -> int:
    """Tokens that all processes together take in one optimiser step."""
    return rows_a_step(arguments) * length


def rows_a_step(arguments: TrainingArguments) -> int:
    """Rows that all processes together take in one optimiser step."""
    batches = arguments.gradient_accumulation_steps * arguments.world_size
    return int(arguments.per_device_train_batch_size * batches)
