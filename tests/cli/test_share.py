"""`echoatt share`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny_models import build_tiny_model
from tests.wording import says

from echoatt_cli import main
from echoatt_exporter import SharingPlan, load_shared

PLAN = SharingPlan((0, 1, 1), ((), (), (3, 2, 0, 1)))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    build_tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@torch.no_grad()
def test_share_writes_the_student_and_says_what_became_smaller(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    student = tmp_path / "student"
    assert main(["share", str(teacher), str(student), "--plan", f"{tmp_path / 'plan.json'}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("plan: ● ● 1   (1 of 3 layers follow, 33%;")

    loaded, tokens = load_shared(student, None), torch.arange(3, 20)[None]
    assert torch.equal(loaded(tokens).logits, load_shared(teacher, PLAN)(tokens).logits)

    assert main(["share", str(teacher), str(tmp_path / "s2"), "--share", "2:1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = [load_shared(teacher, None).num_parameters(), loaded.num_parameters()]
    # 3 layers, each with keys and values of 2 heads of 12 float32, but for one layer's keys
    cache = [6 * 2 * 12 * 4, 5 * 2 * 12 * 4]
    assert report == {
        "student": str(tmp_path / "s2"),
        "sources": [0, 1, 1],
        "notes": [],
        "parameters": dict(zip(("teacher", "student"), counts, strict=True)),
        "cache_bytes_per_token": dict(zip(("teacher", "student"), cache, strict=True)),
    }
    for number in (*counts, *cache):
        assert says(out, f"{number:,}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{teacher}", "{tmp}/out", "--share", "1:2"),
            "layer 1 uses layer 2, which is not earlier",
        ),
        (("{teacher}", "{tmp}/out", "--plan", "{tmp}/absent.json"), "cannot read the sharing plan"),
        (("{tmp}/absent", "{tmp}/out", "--share", "2:1"), "no such directory"),
        (("{teacher}", "{teacher}", "--share", "2:1"), "exists; remove it"),
        (("{tmp}/student", "{tmp}/out", "--share", "2:1"), "is a student; share its teacher"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...],
    message: str,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "{tmp}/student" in arguments:
        load_shared(teacher, "2:1").save_pretrained(tmp_path / "student")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    places = {"tmp": tmp_path, "teacher": teacher}
    assert main(["share", *(argument.format_map(places) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_is_needed(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["share", str(teacher), str(tmp_path / "out")])
    assert end.value.code == 2
