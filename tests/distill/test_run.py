"""Whole runs on a tiny model: what they write, how they go on, what ends them."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distill.conftest import save_student_of, save_teacher

from echoatt_cli import main
from echoatt_exporter import load_shared
from echoatt_exporter.distill import healing_student
from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.healing_student import HealingStudent
from echoatt_exporter.distill.run import DistillReport, distill
from echoatt_exporter.distill.trainer import Progress
from echoatt_exporter.errors import (
    CheckpointError,
    DivergedError,
    OutputExistsError,
    TextError,
    TrainingError,
)

ROOT = Path(__file__).resolve().parents[2]

# 4 rows a step in 2 batches of 2. 14 rows make 3 whole steps, so that both stages, of 6 and 4
# steps, read them more than once.
CONFIG = DistillConfig(
    length=16,
    batch_size=2,
    gradient_accumulation=2,
    stage1_steps=6,
    stage2_steps=4,
    learning_rate=3e-3,
    log_steps=1,
    save_steps=2,
)


def _arguments(teacher: Path, student: Path, text: Path, out: Path) -> list[str]:
    """The command line that says the same as `CONFIG`."""
    given = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {
            name: value
            for name, value in CONFIG.to_dict().items()
            if value != getattr(DistillConfig(), name)
        }.items()
    ]
    where = {"teacher": teacher, "student": student, "text": text, "out": out}
    return ["distill", *(f"--{name}={path}" for name, path in where.items()), *given]


def _log(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return lines


def _assert_same_curve(actual: Path, expected: Path, tolerance: float = 1e-6) -> None:
    found, wanted = _log(actual), _log(expected)
    assert [(x["stage"], x["step"]) for x in found] == [(x["stage"], x["step"]) for x in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_shared(directory, None).state_dict())


@pytest.fixture(scope="module")
def inputs(teacher_dir: Path, student_dir: Path, text_file: Path) -> tuple[Path, Path, Path]:
    """Teacher, student and text."""
    return teacher_dir, student_dir, text_file


@pytest.fixture(scope="module")
def killed(
    inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run that kills itself after step 6 of stage 1, begun early to go on beside other tests."""
    out = tmp_path_factory.mktemp("killed") / "out"
    command = [sys.executable, "-m", "tests.distill.worker", "6", *_arguments(*inputs, out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    yield process, out
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def whole(
    inputs: tuple[Path, Path, Path],
    killed: tuple[subprocess.Popen[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, DistillReport, list[Progress]]:
    """A run that nothing disturbs."""
    out, told = tmp_path_factory.mktemp("whole") / "out", list[Progress]()
    report = distill(inputs[0], inputs[1], [inputs[2]], out, CONFIG, on_step=told.append)
    assert report is not None
    return out, report, told


def test_a_run_heals_the_student_and_says_how(
    whole: tuple[Path, DistillReport, list[Progress]], student_dir: Path
) -> None:
    out, report, told = whole
    lines = _log(out)
    assert [(x["stage"], x["step"]) for x in lines] == [
        *((1, step) for step in range(1, 7)),
        *((2, step) for step in range(1, 5)),
    ]
    assert [line["tokens"] for line in lines] == [64 * line["step"] for line in lines]
    stage_1, stage_2 = lines[:6], lines[6:]
    for line in stage_1:
        parts = 0.25 * line["blocks"] + 0.25 * line["kl"] + 0.5 * line["labels"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert all(line["loss"] == line["text"] for line in stage_2)
    assert stage_1[-1]["loss"] < 0.9 * stage_1[0]["loss"]
    assert stage_2[-1]["loss"] < stage_2[0]["loss"]
    assert [line["learning_rate"] for line in stage_2][1] == pytest.approx(3e-3)

    assert report.student == out / "student"
    assert (report.steps, report.tokens) == ((6, 4), 640)
    assert report.losses == {1: lines[5]["loss"], 2: lines[9]["loss"]}
    assert json.loads(report.to_json())["config"]["length"] == 16
    assert [(p.stage, p.step, p.steps) for p in told] == [
        *((1, step, 6) for step in range(7)),
        *((2, step, 4) for step in range(5)),
    ]
    healed, before = load_shared(out / "student", None), load_shared(student_dir, None)
    assert healed.sources == before.sources == [0, 1, 1]
    configs = [json.loads((d / "config.json").read_text()) for d in (out / "student", student_dir)]
    assert configs[0] == configs[1]
    assert not torch.equal(next(healed.parameters()), next(before.parameters()))
    files = {path.name for path in (out / "student").iterdir()}
    assert files == {path.name for path in student_dir.iterdir()}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    effective = DistillConfig.of(DistillConfig.read_yaml(out / "distill.yaml"))
    assert effective == report.config
    assert effective.attention == "materialized"  # the model has dropout


def test_a_killed_run_goes_on_to_the_same_curve(
    whole: tuple[Path, DistillReport, list[Progress]],
    killed: tuple[subprocess.Popen[str], Path],
    inputs: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    process, out = killed
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "student").exists()
    checkpoints = out / "checkpoints" / "stage-1"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert [line["step"] for line in _log(out)] == [1, 2, 3, 4, 5]  # one too many
    # Killed while saving, and while writing the log
    (checkpoints / "checkpoint-6").mkdir()
    (checkpoints / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (checkpoints / "checkpoint-8").mkdir()
    (checkpoints / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8')
    with (out / "log.jsonl").open("a") as log:
        log.write('{"stage": 1, "st')

    class Stop(KeyboardInterrupt):
        """^C."""

    def interrupt(progress: Progress) -> None:
        if (progress.stage, progress.step) == (2, 4):
            raise Stop

    with pytest.raises(Stop):
        distill(inputs[0], inputs[1], [inputs[2]], out, CONFIG, on_step=interrupt)
    assert not (out / "student").exists()
    assert _log(out)[-1]["step"] == 3

    assert main(_arguments(*inputs, out)) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(f"{out / 'student'}: 640 tokens in 10 steps, ")
    assert "tokens/s; last losses: stage 1 " in shown.out
    _assert_same_curve(out, whole[0])
    for name, weight in _weights(whole[0] / "student").items():
        torch.testing.assert_close(_weights(out / "student")[name], weight, rtol=0, atol=1e-6)


def test_a_finished_or_different_run_is_refused(
    whole: tuple[Path, DistillReport, list[Progress]],
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, text = inputs
    out, _, _ = whole
    before = (out / "log.jsonl").read_bytes()
    assert main(_arguments(*inputs, out)) == 2
    assert capsys.readouterr().err == (
        f"echoatt: {out / 'student'}: exists, this run is finished; name another directory\n"
    )
    # the same folder, had it not come to its end
    unfinished = tmp_path / "out"
    unfinished.mkdir()
    (unfinished / "inputs.json").write_bytes((out / "inputs.json").read_bytes())
    other = dataclasses.replace(CONFIG, learning_rate=1e-3, temperature=2)
    (tmp_path / "other.txt").write_text((text / "0.txt").read_text() * 2)
    with pytest.raises(
        TrainingError, match=r"learning_rate \(0.003 before, 0.001 now\), temp"
    ) as e:
        distill(teacher, student, [tmp_path / "other.txt"], unfinished, other)
    assert "temperature (1.0 before, 2 now), text; give the same to go on" in str(e.value)
    with pytest.raises(TrainingError, match="begun with another student; give"):
        distill(teacher, teacher, [text], unfinished, CONFIG)
    assert [path.name for path in unfinished.iterdir()] == ["inputs.json"]
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "holds files that are not"), (tmp_path / "file", "is a file")):
        with pytest.raises(OutputExistsError, match=message):
            distill(teacher, student, [text], path, CONFIG)
    assert (out / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention": "recomputed"}, TrainingError, "attention 'recomputed' cannot train this"),
        ({"stage1_steps": 0, "stage2_steps": 0}, TrainingError, "both stages have 0 steps"),
        ({"batch_size": 99}, TextError, r"14 rows of 16 tokens and one step takes 198; give more"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=rf"\b{message}") as caught:
        distill(inputs[0], inputs[1], [inputs[2]], out, dataclasses.replace(CONFIG, **changes))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_disk_that_refuses_is_one_line(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HealingStudent, "save_pretrained", refuse)
    with pytest.raises(TrainingError, match=r"out: cannot be written \(.*No space left") as caught:
        distill(inputs[0], inputs[1], [inputs[2]], tmp_path / "out", CONFIG)
    assert "\n" not in str(caught.value)


def test_another_models_student_is_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    wider = save_teacher(tmp_path / "wider", hidden_size=48)
    with pytest.raises(
        CheckpointError, match=r"not this student's teacher: .* hidden_size 48 and 32\b"
    ):
        distill(wider, inputs[1], [inputs[2]], tmp_path / "out", CONFIG)
    with pytest.raises(CheckpointError, match="is a student; a teacher is needed here"):
        distill(inputs[1], inputs[1], [inputs[2]], tmp_path / "out", CONFIG)


def _poison_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second gradient of one weight gets one NaN."""
    of, calls = HealingStudent.of.__func__, [0]  # type: ignore[attr-defined]

    def hooked(cls: Any, *arguments: Any) -> HealingStudent:
        student: HealingStudent = of(cls, *arguments)

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            gradient = gradient.clone()
            gradient[0, 0] = float("nan") if calls[0] == 3 else gradient[0, 0]
            return gradient

        student.decoder.model.layers[1].mlp.up_proj.weight.register_hook(poison)
        return student

    monkeypatch.setattr(HealingStudent, "of", classmethod(hooked))


def _poison_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing_student, "block_loss", lambda ours, _: ours[0].sum() * float("inf"))


@pytest.mark.parametrize(
    ("poison", "changes", "message"),
    [
        (
            _poison_gradient,
            {},
            r"stage 1, step 2: the gradient of decoder.model.layers.1.mlp.up_proj.weight is not",
        ),
        (
            _poison_gradient,
            {"max_grad_norm": 0.0},
            r"stage 1, step 2: the gradient of decoder.model.layers.1.mlp.up_proj.weight is not",
        ),
        (_poison_loss, {}, r"stage 1, step 1: the loss is not a finite number \(.*blocks is -?inf"),
        (
            lambda _: None,
            {"learning_rate": 1e38, "scheduler": "constant"},
            r"stage 1, step 3: the (weights|gradient) of decoder\.\S+ (are no longer|is not) fin",
        ),
    ],
    ids=["gradient", "gradient, no clipping", "loss", "weights"],
)
def test_divergence_ends_the_run_and_names_the_culprit(
    poison: Any,
    changes: dict[str, Any],
    message: str,
    inputs: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch)
    config, out = dataclasses.replace(CONFIG, **changes), tmp_path / "out"
    with pytest.raises(DivergedError, match=message) as caught:
        distill(inputs[0], inputs[1], [inputs[2]], out, config)
    assert "\n" not in str(caught.value)
    assert not (out / "student").exists()


def test_bfloat16_checkpointing_and_recomputed_attention_together(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    student = save_student_of(teacher, tmp_path / "student")
    out = tmp_path / "out"
    arguments = [
        *_arguments(teacher, student, text_file, out),
        *("--dtype=bf16", "--gradient-checkpointing", "--attention=recomputed", "--json"),
    ]
    (tmp_path / "c.yaml").write_text("stage1_tokens: 99\nstage2_learning_rate: 0.004\nlength: 8\n")
    assert main([*arguments, "--config", str(tmp_path / "c.yaml")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["student"] == str(out / "student")
    # the command line comes before the file
    assert report["config"]["stage2_learning_rate"] == 0.004
    assert (report["config"]["length"], report["config"]["stage1_steps"]) == (16, 6)
    losses = [line["loss"] for line in _log(out)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[3:6]) < sum(losses[:3])
    assert sum(losses[8:]) < sum(losses[6:8])
    assert load_shared(out / "student", None).dtype == torch.float32


def test_a_teacher_alone_is_trained_as_the_control(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    teacher, _, text = inputs
    config = dataclasses.replace(CONFIG, stage1_steps=0, stage2_steps=2)
    report = distill(teacher, teacher, [text], tmp_path / "out", config)
    assert report is not None
    assert list(report.losses) == [2]
    control = load_shared(report.student, None)
    assert control.sources == [0, 1, 2]
    assert not torch.equal(
        control.decoder.model.layers[2].self_attn.q_proj.weight,
        load_shared(teacher, None).decoder.model.layers[2].self_attn.q_proj.weight,
    )


def test_two_processes_are_one_with_twice_the_batch(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """As torchrun starts them, on the CPU."""
    teacher, text = save_teacher(tmp_path / "teacher"), inputs[2]  # no dropout
    student = save_student_of(teacher, tmp_path / "student")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [
        *(sys.executable, "-m", "echoatt_cli"),
        *_arguments(teacher, student, text, tmp_path / "two"),
        *("--gradient-accumulation=1", "--stage1-steps=2", "--stage2-steps=1"),
    ]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | common
            | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    config = dataclasses.replace(
        CONFIG, batch_size=4, gradient_accumulation=1, stage1_steps=2, stage2_steps=1
    )
    distill(teacher, student, [text], tmp_path / "one", config)
    try:
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert [bool(out) for out, _ in said] == [True, False]
    assert json.loads((tmp_path / "two" / "inputs.json").read_text())["processes"] == 2
    _assert_same_curve(tmp_path / "two", tmp_path / "one", tolerance=1e-3)
    for name, weight in _weights(tmp_path / "one" / "student").items():
        torch.testing.assert_close(
            _weights(tmp_path / "two" / "student")[name], weight, rtol=0, atol=1e-3
        )
