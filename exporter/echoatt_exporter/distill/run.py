"""A whole healing run: both stages from teacher to healed student, or on from where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.curves import draw_curves
from echoatt_exporter.distill.data import TokenRows, pack_rows, split_stages
from echoatt_exporter.distill.healing_student import HealingStudent, set_attention
from echoatt_exporter.distill.resolve import resolve_config, stages_of
from echoatt_exporter.distill.run_folder import RunFolder
from echoatt_exporter.distill.trainer import (
    HealingTrainer,
    Progress,
    Stage,
    rows_a_step,
    training_arguments,
)
from echoatt_exporter.errors import TrainingError
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.checkpoint import load_shared, load_teacher
from echoatt_exporter.share.matching_models import check_pair, check_tokens
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.outline import read_outline, read_teacher_outline
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_exporter.share.save import save_student
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_exporter.texts import load_tokenizer, read_texts, texts_digest
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import one_line


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a run did.

    Attributes:
        student: The healed student's directory.
        steps: Optimiser steps of each stage.
        tokens: Tokens trained on in both stages, those before a resumption too.
        seconds: That this call took in training.
        tokens_per_second: In this call; None where it trained nothing.
        losses: The last logged loss of each stage that has one, by its number.
        config: The configuration in effect.
    """

    student: Path
    steps: tuple[int, int]
    tokens: int
    seconds: float
    tokens_per_second: float | None
    losses: dict[int, float]
    config: DistillConfig

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(
            dataclasses.asdict(self) | {"student": str(self.student)}, ensure_ascii=False
        )


def distill(
    teacher_dir: str | Path,
    student_dir: str | Path,
    text_files: Sequence[str | Path],
    out: str | Path,
    config: DistillConfig | None = None,
    *,
    trust_remote_code: bool = False,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> DistillReport | None:
    """Heal a student (EchoAtt, arXiv 2409.14595, "Adjust").

    Stage 1 distils the teacher into the student, stage 2 trains it on the text. A run that was
    stopped goes on from its last checkpoint when it is started again with the same inputs.
    Under `torchrun` or `accelerate launch` every process calls this.

    Args:
        teacher_dir: The teacher.
        student_dir: The student; a teacher's directory is trained unshared, as a control.
        text_files: See `echoatt_exporter.texts.read_texts`.
        out: Gets `student`, `loss.png`, `log.jsonl`, `distill.yaml` and `checkpoints`.
        config: How; None for the defaults.
        trust_remote_code: Run code that the checkpoints bring.
        on_step: Called in the main process after each step.

    Returns:
        What was done; None in processes other than the main one.

    Raises:
        OutputExistsError: `out` holds a finished run.
        TrainingError: `out` holds another run, or the configuration does not fit the model.
        DivergedError: The loss or a gradient is not a number.
        TextError: Unreadable texts, or too little for one step.
        CheckpointError: A model directory that cannot be read, or not this student's teacher's.
        UnsupportedModelError: A model that cannot be shared.
    """
    config = config or DistillConfig()
    folder = RunFolder(Path(out))
    folder.check_unfinished()
    texts = read_texts(text_files)
    read_outline(student_dir, None, trust_remote_code=trust_remote_code)
    read_teacher_outline(teacher_dir, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(student_dir, trust_remote_code=trust_remote_code)
    student = load_shared(student_dir, None, trust_remote_code=trust_remote_code)
    dtype, text_config = student.dtype, student.decoder.config
    teacher = load_teacher(
        teacher_dir,
        dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
        trust_remote_code=trust_remote_code,
    )
    check_pair(teacher_dir, teacher.config, text_config)
    length = min(config.length, architecture_of(text_config).context_length)
    rows = pack_rows(texts, tokenizer, length)
    check_tokens(student_dir, rows, text_config.vocab_size)
    with quiet_transformers():
        arguments = training_arguments(config, Stage(1, 1, 1.0), folder.checkpoints(1))
        a_step = rows_a_step(arguments)
        config = resolve_config(
            config, length, len(rows), a_step, text_config, arguments.device.type
        )
        stages = stages_of(config)
        data = split_stages(rows, (stages[0].steps, stages[1].steps), a_step, config.seed)
        main = arguments.process_index == 0
        if main:
            folder.begin(
                config,
                teacher=checkpoint_digest(teacher_dir),
                student=checkpoint_digest(student_dir),
                text=texts_digest(texts),
                processes=arguments.world_size,
            )
        _wait(arguments)
        # An unshared student for a teacher: one code for the hidden states of both
        unshared = share_attention(teacher, SharingPlan.unshared(len(student.sources)))
        run = _Run(config, folder, unshared.requires_grad_(False), on_step)
        latest = student
        for stage, stage_rows in zip(stages, data, strict=True):
            done = folder.stage_student(stage.number)
            if stage.steps and not done.is_dir():
                with _one_line_errors(folder.root):
                    run.train(latest, stage, stage_rows)
            if done.is_dir():
                latest = load_shared(done, None)
    if not main:
        return None
    lines = folder.read_log()
    with _one_line_errors(folder.root):
        draw_curves(lines, folder.curves)
    latest.generation_config = student.generation_config
    nn.Module.to(latest, dtype)
    save_student(latest, folder.student, student_dir, trust_remote_code=trust_remote_code)
    return DistillReport(
        student=folder.student,
        steps=(stages[0].steps, stages[1].steps),
        tokens=sum(stage.steps for stage in stages) * a_step * length,
        seconds=run.seconds,
        tokens_per_second=run.trained / run.seconds if run.trained else None,
        losses={line["stage"]: line["loss"] for line in lines},
        config=config,
    )


def _wait(arguments: TrainingArguments) -> None:
    arguments.distributed_state.wait_for_everyone()


@dataclass
class _Run:
    """What both stages of a run have in common."""

    config: DistillConfig
    folder: RunFolder
    teacher: EchoAttForCausalLM
    on_step: Callable[[Progress], None]
    seconds: float = 0.0
    trained: int = 0

    def train(self, student: EchoAttForCausalLM, stage: Stage, rows: TokenRows) -> None:
        """Train a student through one stage, from its last checkpoint if there is one."""
        config, folder = self.config, self.folder
        recomputed = config.attention == "recomputed"
        nn.Module.to(student, torch.float32)
        healing = HealingStudent.of(student, config)
        set_attention(healing, recomputed=recomputed)
        arguments = training_arguments(config, stage, folder.checkpoints(stage.number))
        main = arguments.process_index == 0
        if main:
            folder.clean_up(stage.number)
        _wait(arguments)
        checkpoint = folder.newest_checkpoint(stage.number)
        if stage.number == 1:
            set_attention(self.teacher, recomputed=recomputed)
        trainer = HealingTrainer(
            healing,
            self.teacher if stage.number == 1 else None,
            arguments,
            stage,
            rows,
            on_log=folder.append_log,
            on_step=self.on_step,
        )
        start = time.perf_counter()
        partial = folder.stage_student(stage.number).with_suffix(".partial")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.seconds += time.perf_counter() - start
        trainer.save_model(str(partial))
        self.trained += (stage.steps - trainer.resumed_step) * trainer.tokens_a_step
        _wait(arguments)
        if main:
            partial.rename(folder.stage_student(stage.number))
        _wait(arguments)


@contextlib.contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    """Turn what the machine runs out of into a line.

    Raises:
        TrainingError: Memory or the disk is full, or the disk refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{out}: cannot be written ({one_line(error)[:200]}); the same command goes on from the"
            " last whole checkpoint"
        ) from error
    except RuntimeError as error:
        text = one_line(error)[:200]
        # torch has no classes for either on the CPU
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise TrainingError(
                f"out of memory ({text}); take a smaller batch_size with more"
                " gradient_accumulation, gradient_checkpointing, or a smaller length"
            ) from error
        if "PytorchStreamWriter" in text:
            raise TrainingError(f"{out}: cannot be written ({text}); make room") from error
        raise
