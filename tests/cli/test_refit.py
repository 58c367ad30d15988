"""`echoatt refit`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.wording import says

from echoatt_cli import main
from echoatt_exporter import load_shared
from echoatt_exporter.share.save import save_student


@pytest.fixture
def student(stories260k: Path, tmp_path: Path) -> Path:
    save_student(load_shared(stories260k, "2:1,3:1"), tmp_path / "student", stories260k)
    return tmp_path / "student"


def test_refit_writes_a_student_and_says_what_it_gained(
    student: Path,
    stories260k: Path,
    shared_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = str(shared_dir / "data" / "tinystories.txt")
    common = ("--teacher", str(stories260k), "--text", text, "--windows", "16")
    out = tmp_path / "out"
    assert main(["refit", str(student), str(out), *common]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert says(shown, "held-out tokens, fitted on 3,072")
    assert shown.startswith(f"{out}: KL to the teacher 0.")

    assert main(["refit", str(student), str(tmp_path / "again"), *common, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"] < 0.7 * report["kl_before"]
    assert (report["tokens"], report["held_out_tokens"]) == (3072, 1024)
    assert [step["fits"][0]["layer"] for step in report["steps"]] == [2, 2, 3]
    assert not report["starved"]
    models = [load_shared(path, None) for path in (out, tmp_path / "again", student)]
    tokens = torch.arange(3, 40)[None]
    one, again, before = (model(tokens).logits for model in models)
    assert torch.equal(one, again)
    assert not torch.equal(one, before)
    assert models[0].sources == [0, 1, 1, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{teacher}", "{tmp}/out", "--teacher", "{teacher}"), "is not a student; make one"),
        (("{student}", "{tmp}/out", "--teacher", "{student}"), "is a student"),
        (("{student}", "{student}", "--teacher", "{teacher}"), "exists; remove it"),
        (("{student}", "{tmp}/out", "--teacher", "{teacher}", "--windows", "1"), "too little text"),
        (
            ("{student}", "{tmp}/out", "--teacher", "{teacher}", "--device", "nowhere"),
            "no device 'nowhere'",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...],
    message: str,
    student: Path,
    stories260k: Path,
    shared_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    places = {"tmp": tmp_path, "teacher": stories260k, "student": student}
    text = ("--text", str(shared_dir / "data" / "tinystories.txt"))
    assert main(["refit", *(part.format_map(places) for part in arguments), *text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says(err, message)
    assert sorted(tmp_path.rglob("*")) == before
