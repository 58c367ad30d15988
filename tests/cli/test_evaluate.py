"""`echoatt evaluate`: one model or two, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.wording import says

from echoatt_cli import main
from echoatt_exporter import export_bundle, load_shared
from echoatt_exporter.evaluate.models import open_model
from echoatt_exporter.evaluate.perplexity import compare_documents
from echoatt_exporter.share.save import save_student
from echoatt_exporter.texts import load_tokenizer, read_texts

TEACHER = Path(__file__).resolve().parents[2] / "samples" / "tiny-books"
TEXT = TEACHER / "README.md"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "student"
    save_student(load_shared(TEACHER, "1:0,2:0,3:0"), path, TEACHER)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a trained tokenizer."""
    path: Path = tmp_path_factory.mktemp("tiny") / "teacher"
    model = tiny_model("llama", vocab_size=1024, num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(path)
    load_tokenizer(TEACHER).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.onnx"
    return export_bundle(tiny, path, verify=False).model


@pytest.mark.parametrize(
    ("pair", "least", "most"),
    [(("student", "teacher"), 0.05, 1), (("bundle", "tiny"), 0, 1e-9)],
    ids=["student to teacher", "bundle to its checkpoint"],
)
def test_two_models_side_by_side(
    pair: tuple[str, str],
    least: float,
    most: float,
    student: Path,
    tiny: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"student": student, "teacher": TEACHER, "bundle": bundle, "tiny": tiny}
    paths = [places[name] for name in pair]
    arguments = ["evaluate", paths[0], "--against", paths[1], "--text", TEXT, "--length", "64"]
    assert main([str(argument) for argument in (*arguments, "--max-tokens", 300, "--json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report: dict[str, Any] = json.loads(out)

    compared = compare_documents(
        *map(open_model, paths), read_texts([TEXT]), length=64, stride=32, max_tokens=300
    )
    assert (report["tokens"], report["length"], report["stride"]) == (300, 64, 32)
    assert report["bytes"] == compared.score.bytes
    scores = (compared.score, compared.reference)
    for name, path, score in zip(("model", "against"), paths, scores, strict=True):
        assert report[name]["path"] == str(path)
        assert report[name]["perplexity"] == pytest.approx(score.perplexity)
        assert report[name]["bits_per_byte"] == pytest.approx(score.bits_per_byte)
        assert report[name]["perplexity_interval"] == pytest.approx(score.interval())
    ratio = compared.ratio()
    assert report["perplexity_ratio"] == pytest.approx(ratio.ratio)
    assert report["perplexity_ratio_interval"] == pytest.approx(ratio.interval)
    assert report["kl"] == pytest.approx(compared.kl)
    assert least <= report["kl"] <= most
    assert report["kl_interval"] == pytest.approx(compared.kl_interval())
    assert report["top1_agreement"] == compared.top1_agreement


def test_report_of_a_bundle_alone(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = ["evaluate", str(bundle), "--text", str(TEXT), "--max-tokens", "100", "--json"]
        assert main([*arguments, "--threads", "2"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    # The tiny model's context
    assert (report["tokens"], report["length"], report["stride"]) == (100, 64, 32)
    assert report["model"]["path"] == str(bundle)
    for name in ("against", "perplexity_ratio", "kl", "kl_interval", "top1_agreement"):
        assert report[name] is None


def test_tables_for_people(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(student), "--text", str(TEXT), "--max-tokens", "100"]
    assert main(arguments) == 0
    alone, err = capsys.readouterr()
    assert err == ""
    assert "perplexity" in alone
    assert "ratio" not in alone
    assert "KL" not in alone
    assert says(alone, "100 tokens")
    assert says(alone, "windows of 512 tokens by 256")
    assert main([*arguments, "--against", str(student)]) == 0
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert ["perplexity ratio", "1.0000", "1.0000 to 1.0000"] in rows
    assert ["KL, nats a token", "0", "0 to 0"] in rows
    assert ["same most probable token", "100.00%", ""] in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{student}", "--text", "{tmp}/absent.txt"), "absent.txt"),
        (("{student}", "--text", "{tmp}/empty.txt"), "no text in"),
        (("{tmp}/absent", "--text", "{text}"), "absent: no such directory"),
        (
            ("{student}", "--against", "{tmp}", "--text", "{text}"),
            "not a Hugging Face model",
        ),
        (("{text}", "--text", "{text}"), "is not an ONNX model"),
        (("{bundle}", "--text", "{text}", "--length", "65"), "give 2 to 64"),
        (("{bundle}", "--text", "{text}", "--device", "abacus"), "unknown device 'abacus'"),
        (("{tiny}", "--against", "{student}", "--text", "{text}", "--length", "65"), "2 to 64"),
        (("{student}", "--text", "{text}", "--threads", "0"), "0 threads"),
        (("{student}", "--text", "{text}", "--length", "513"), "give 2 to 512"),
        (("{student}", "--text", "{text}", "--stride", "0"), "a stride of 0"),
        (("{student}", "--text", "{text}", "--device", "abacus"), "cannot compute on 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    student: Path,
    tiny: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"tmp": tmp_path, "student": student, "tiny": tiny, "bundle": bundle, "text": TEXT}
    assert main(["evaluate", *(argument.format_map(places) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says(err, message)
