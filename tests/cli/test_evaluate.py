"""``echoatt evaluate``: one model or two, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from echoatt_cli import main
from echoatt_exporter import load_student
from echoatt_exporter.evaluate.perplexity import compare_scores, score_documents
from echoatt_exporter.share.checkpoint import load_model, save_student
from echoatt_exporter.texts import load_tokenizer, read_texts

TEACHER = Path(__file__).resolve().parents[2] / "samples" / "tiny-books"
TEXT = TEACHER / "README.md"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "student"
    save_student(load_student(TEACHER, "1:0,2:0,3:0"), path, TEACHER)
    return path


def test_two_models_side_by_side(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", student, "--against", TEACHER, "--text", TEXT, "--length", "64"]
    assert main([str(argument) for argument in (*arguments, "--max-tokens", 300, "--json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report: dict[str, Any] = json.loads(out)

    scores = [
        score_documents(
            load_model(directory, dtype=torch.float32),
            read_texts([TEXT]),
            load_tokenizer(directory),
            length=64,
            stride=32,
            max_tokens=300,
        )
        for directory in (student, TEACHER)
    ]
    ratio = compare_scores(*scores)
    assert (report["tokens"], report["length"], report["stride"]) == (300, 64, 32)
    assert report["bytes"] == scores[0].bytes
    for name, directory, score in zip(
        ("model", "against"), (student, TEACHER), scores, strict=True
    ):
        assert report[name]["directory"] == str(directory)
        assert report[name]["perplexity"] == pytest.approx(score.perplexity)
        assert report[name]["bits_per_byte"] == pytest.approx(score.bits_per_byte)
        assert report[name]["perplexity_interval"] == pytest.approx(score.interval())
    assert report["perplexity_ratio"] == pytest.approx(ratio.ratio)
    assert report["perplexity_ratio_interval"] == pytest.approx(ratio.interval)


def test_tables_for_people(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(student), "--text", str(TEXT), "--max-tokens", "100"]
    assert main(arguments) == 0
    alone, err = capsys.readouterr()
    assert err == ""
    assert "perplexity" in alone
    assert "ratio" not in alone
    assert "100 tokens" in alone
    assert "windows of 512 tokens by 256" in alone
    assert main([*arguments, "--against", str(student)]) == 0
    assert "perplexity ratio 1.0000 (95 % interval 1.0000 to 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{student}", "--text", "{tmp}/absent.txt"), "absent.txt"),
        (("{student}", "--text", "{tmp}/empty.txt"), "no text in"),
        (("{tmp}/absent", "--text", "{text}"), "absent"),
        (("{tmp}", "--text", "{text}"), "tokenizer"),
        (("{student}", "--text", "{text}", "--length", "513"), "give 2 to 512"),
        (("{student}", "--text", "{text}", "--stride", "0"), "a stride of 0"),
        (("{student}", "--text", "{text}", "--device", "abacus"), "cannot compute on 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"tmp": tmp_path, "student": student, "text": TEXT}
    assert main(["evaluate", *(argument.format_map(places) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
