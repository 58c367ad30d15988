"""Re-fitted students: what they give, every family, and what is kept when it is stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import build_tiny_model, every_family, tiny_plan

from echoatt_exporter import SharingPlan, load_shared
from echoatt_exporter.errors import CheckpointError, OutputExistsError, TextError
from echoatt_exporter.families import family_of
from echoatt_exporter.refit.layer_walk import LayerWalk
from echoatt_exporter.refit.refit import ALONE, refit_student
from echoatt_exporter.refit.run import refit
from echoatt_exporter.refit.spilled import SpilledTensor
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME
from echoatt_exporter.share.save import save_student
from echoatt_runtime.errors import OutOfMemoryError

FLOAT = torch.float32


def _windows(count: int, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(3))


@every_family
@torch.no_grad()
def test_every_family_comes_nearer_to_its_teacher(family: str) -> None:
    teacher, plan = build_tiny_model(family), tiny_plan(family)
    student = share_attention(copy.deepcopy(teacher), plan)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    # The tiny models' windows are short
    report = refit_student(student, teacher, _windows(24, 16), _windows(4, 16), dtype=FLOAT)
    assert report.kl < 0.9 * report.kl_before
    # What it says is what the student gives
    logits = [model(_windows(4, 16)).logits.log_softmax(-1) for model in (teacher, student)]
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert kl == pytest.approx(report.kl, rel=1e-3)
    followers = family_of(teacher.config).layers_of(student.decoder)
    changed = {n for n, w in student.state_dict().items() if not torch.equal(w, before[n])}
    names = {module: name for name, module in student.named_modules()}
    inside = tuple(names[followers[layer]] for layer in plan.followers)
    assert changed
    assert all(name.startswith(inside) for name in changed)


@every_family
@torch.no_grad()
def test_a_walk_through_the_layers_is_the_model(family: str) -> None:
    student = share_attention(build_tiny_model(family), tiny_plan(family))
    windows = _windows(3, 16)
    expected = student(windows).logits
    with lending_attention(student.decoder, RECOMPUTED_NAME):
        walk = LayerWalk(student.decoder, student.sources, windows)
        for _ in range(3):
            hidden = torch.cat([walk.finish(rows) for rows in walk.batches])
            found = head_of(student.decoder)(hidden)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
            walk.advance()


@torch.no_grad()
def test_a_projection_that_can_be_found_again_is() -> None:
    """All attend evenly, so that a follower loses nothing but what is broken here."""
    teacher = build_tiny_model("llama")
    for layer in teacher.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    student = share_attention(copy.deepcopy(teacher), SharingPlan((0, 1, 1, 3, 4, 5)))
    projection = student.decoder.model.layers[2].self_attn.o_proj
    projection.weight.data = torch.randn(projection.weight.shape)
    report = refit_student(student, teacher, _windows(96), _windows(8), dtype=FLOAT)
    assert report.steps[0].fits[0].part == ALONE
    assert report.steps[0].fits[0].left < 1e-4
    assert report.kl_before > 0.1
    assert report.kl < 1e-4 * report.kl_before


@torch.no_grad()
def test_a_teacher_stays_as_it_is() -> None:
    teacher = build_tiny_model("llama")
    student = share_attention(copy.deepcopy(teacher), SharingPlan.unshared(6))
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    report = refit_student(student, teacher, _windows(8), _windows(2), dtype=FLOAT)
    assert not report.steps
    assert all(torch.equal(weight, before[n]) for n, weight in student.state_dict().items())


@torch.no_grad()
def test_weights_that_help_nobody_are_not_kept() -> None:
    """What is learned of eight tokens does not hold on others."""
    teacher = build_tiny_model("llama")
    student = share_attention(copy.deepcopy(teacher), SharingPlan((0, 1, 1, 3, 4, 5)))
    windows = _windows(1, 8).repeat(2, 1)  # both halves alike: it judges itself as perfect
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    report = refit_student(student, teacher, windows, _windows(8), dtype=FLOAT)
    assert report.starved
    assert report.unchanged == [2]
    assert all(torch.equal(weight, before[n]) for n, weight in student.state_dict().items())
    assert report.kl == report.kl_before


@torch.no_grad()
def test_attention_that_gives_nothing_is_left_as_it_is() -> None:
    """As in checkpoints that were made deeper: there is nothing to be a share of."""
    teacher = build_tiny_model("llama")
    teacher.model.layers[2].self_attn.o_proj.weight.zero_()
    student = share_attention(copy.deepcopy(teacher), SharingPlan((0, 1, 1, 1, 4, 5)))
    report = refit_student(student, teacher, _windows(24), _windows(4), dtype=FLOAT)
    assert 0 < report.kl < report.kl_before
    assert 2 in report.unchanged


def test_states_that_find_no_room_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutOfMemoryError, match=r"no room for 96 bytes in .*TMPDIR"):
        SpilledTensor((2, 3, 4), torch.float32)


@pytest.fixture
def directories(tmp_path: Path, stories260k: Path) -> tuple[Path, Path]:
    """A trained teacher and its student."""
    student = tmp_path / "student"
    save_student(load_shared(stories260k, "2:1,3:1"), student, stories260k)
    return student, stories260k


def test_a_stopped_fit_goes_on_to_the_same_weights(
    directories: tuple[Path, Path], shared_dir: Path, tmp_path: Path
) -> None:
    student, teacher = directories
    texts = [shared_dir / "data" / "tinystories.txt"]
    options: dict[str, Any] = {"length": 128, "windows": 64}

    def stop(name: str, done: int, _total: int) -> None:
        if name == "fit" and done == 2:
            raise KeyboardInterrupt

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        refit(student, teacher, texts, stopped, **options, on_step=stop)
    assert not stopped.exists()
    first = refit(student, teacher, texts, stopped, **options)
    second = refit(student, teacher, texts, whole, **options)
    assert (first.resumed, second.resumed) == (2, 0)
    assert first.report == second.report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "student", "whole"]
    weights = [load_file(path / "model.safetensors") for path in (stopped, whole)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    # Measured: 0.484 to 0.257
    assert first.report.kl < 0.6 * first.report.kl_before


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"student_dir": "{teacher}"}, CheckpointError, "is not a student; make one with"),
        ({"teacher_dir": "{student}"}, CheckpointError, "is a student"),
        ({"teacher_dir": "{other}"}, CheckpointError, "is not this student's teacher"),
        ({"text_paths": ["{tmp}/short.txt"]}, TextError, "too little text"),
        ({"out": "{student}"}, OutputExistsError, "exists; remove it"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(
    edit: dict[str, Any],
    error: type[Exception],
    message: str,
    directories: tuple[Path, Path],
    shared_dir: Path,
    tmp_path: Path,
) -> None:
    student, teacher = directories
    (tmp_path / "short.txt").write_text("Once upon a time there was a dog. " * 40)
    before = sorted(tmp_path.iterdir())
    other = shared_dir / "models" / "books12"
    places = {"student": student, "teacher": teacher, "tmp": tmp_path, "other": other}

    def put(value: Any) -> Any:
        one = isinstance(value, str)
        found = [part.format_map(places) for part in ([value] if one else value)]
        return found[0] if one else found

    arguments: dict[str, Any] = {
        "student_dir": student,
        "teacher_dir": teacher,
        "text_paths": [shared_dir / "data" / "tinystories.txt"],
        "out": tmp_path / "out",
        **{name: put(value) for name, value in edit.items()},
    }
    with pytest.raises(error, match=message):
        refit(**arguments, length=256)
    assert sorted(tmp_path.iterdir()) == before
