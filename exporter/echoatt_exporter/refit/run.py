"""A re-fit, from a student's directory, its teacher's and texts to a new student's directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.devices import check_torch_device
from echoatt_exporter.errors import CheckpointError, TextError
from echoatt_exporter.refit.kept_steps import KeptSteps
from echoatt_exporter.refit.refit import RefitReport, Step, refit_student
from echoatt_exporter.share.checkpoint import load_shared, load_teacher
from echoatt_exporter.share.matching_models import check_pair, check_tokens
from echoatt_exporter.share.outline import read_outline, read_teacher_outline
from echoatt_exporter.share.save import check_new_directory, save_student
from echoatt_exporter.share.weight_files import checkpoint_digest, stored_dtype
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows, texts_digest

# Of the windows, the share whose KL says whether new weights are kept, and the most of them
_HELD_OUT_SHARE, _HELD_OUT = 4, 8


@dataclass(frozen=True, slots=True)
class RefitRun:
    """What was written.

    Attributes:
        student: The new student's directory.
        report: What was done.
        resumed: How many steps an earlier run had done.
        seconds: What this one took.
        notes: What a user should know of the tokenizer.
    """

    student: Path
    report: RefitReport
    resumed: int
    seconds: float
    notes: Sequence[str]


def refit(
    student_dir: str | Path,
    teacher_dir: str | Path,
    text_paths: Sequence[str | Path],
    out: str | Path,
    *,
    length: int = 256,
    windows: int = 128,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_step: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> RefitRun:
    """Re-fit a student to its teacher by regressions on text, and save it.

    A folder beside `out` keeps what is done until the student is there: the same call goes on where
    it was stopped, to the same weights.

    Args:
        student_dir: A student.
        teacher_dir: The teacher that it was made of.
        text_paths: Files and folders, as `read_texts` takes them.
        out: The new student's directory; must not exist, or be empty.
        length: Tokens of a window; never more than the model's context.
        windows: How many windows of the text are used, at most: every fourth, at most 8, is held
            out and says whether new weights are kept.
        seed: Which windows are drawn.
        device: Where the models run, as torch names it.
        trust_remote_code: Run code that the checkpoints bring.
        on_step: Told (step, done, total): `load`, and `fit` with the layers done.

    Raises:
        OutputExistsError: `out` is there already.
        DeviceError: PyTorch has no such device here.
        CheckpointError: A directory cannot be read, or they do not belong together.
        UnsupportedModelError: The model cannot be shared.
        TextError: Unreadable text, or too little.
        ExportError: Writing failed.
    """
    start = time.perf_counter()
    source, target = Path(student_dir), Path(out)
    check_new_directory(target)
    check_torch_device(device)
    texts = read_texts(text_paths)
    on_step("load", 0, 1)
    outline = read_outline(source, None, trust_remote_code=trust_remote_code)
    if not outline.is_student:
        raise CheckpointError(f"{source}: is not a student; make one with `echoatt share` first")
    read_teacher_outline(teacher_dir, trust_remote_code=trust_remote_code)
    dtype = stored_dtype(outline.tensors, source)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    student = load_shared(source, None, dtype=torch.float32)
    teacher = load_teacher(teacher_dir, dtype=torch.float32, trust_remote_code=trust_remote_code)
    check_pair(teacher_dir, teacher.config, student.decoder.config)
    length = min(length, architecture_of(teacher.config).context_length)
    rows_WT = sample_windows(texts, tokenizer, length=length, count=windows, seed=seed)
    if len(rows_WT) < 2:
        raise TextError(
            f"too little text: it fills one window of {length} tokens, and a re-fit takes two, one"
            " of them to judge by; give more text, or a smaller length"
        )
    check_tokens(source, rows_WT, student.decoder.config.vocab_size)
    held_out = max(1, min(_HELD_OUT, len(rows_WT) // _HELD_OUT_SHARE))
    for model in (student, teacher):
        nn.Module.to(model, device)
    rows_WT = rows_WT.to(device)
    kept = KeptSteps(
        target,
        {
            "teacher": checkpoint_digest(teacher_dir),
            "student": checkpoint_digest(source),
            "text": texts_digest(texts),
            "windows": hashlib.sha256(rows_WT.cpu().numpy().tobytes()).hexdigest(),
            "device": device,
            "versions": {name: version(name) for name in ("echoatt", "torch", "transformers")},
        },
    )
    done = kept.load()
    steps = len(done)
    followers = sum(layer != source for layer, source in enumerate(student.sources))

    def keep(step: Step) -> None:
        nonlocal steps
        kept.keep(steps, step)
        steps += 1
        on_step("fit", steps, followers + 1)

    on_step("fit", steps, followers + 1)
    report = refit_student(
        student,
        teacher,
        rows_WT[held_out:],
        rows_WT[:held_out],
        dtype=dtype,
        done=done,
        on_step=keep,
    )
    nn.Module.to(student, device="cpu", dtype=dtype)
    notes = save_student(student, target, source, trust_remote_code=trust_remote_code)
    kept.drop()
    return RefitRun(target, report, len(done), time.perf_counter() - start, notes)
