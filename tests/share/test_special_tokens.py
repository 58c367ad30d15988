"""Special tokens outside the vocabulary are as if they were absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import VOCAB_SIZE, build_tiny_model

from echoatt_exporter import SharingPlan, load_shared, load_teacher, save_student
from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.outline import read_outline
from echoatt_exporter.share.special_tokens import special_tokens

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build_tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "generation_config.json").unlink()
    return tmp_path / "checkpoint"


def _name(path: Path, **tokens: Any) -> None:
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(fields | {f"{name}_token_id": t for name, t in tokens.items()}))


def _found(checkpoint: Path) -> tuple[Any, ...]:
    outline = read_outline(checkpoint, None)
    found = special_tokens(checkpoint, outline.text_config, outline.architecture.vocab_size)
    return found["bos_token_id"], found["eos_token_ids"], found["pad_token_id"]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"pad": -1}, {}, (1, (2,), None)),
        ({"pad": VOCAB_SIZE}, {"pad": -1}, (1, (2,), None)),
        ({"bos": 99, "eos": -1, "pad": 0}, {}, (None, (), 0)),
        ({"eos": [2, 99, 5, -1]}, {}, (1, (2, 5), 0)),
        ({"eos": [99, -1]}, {}, (1, (), 0)),
        # What generate() would use comes first, if it is there
        ({}, {"bos": 3, "eos": [4, 5], "pad": 6}, (3, (4, 5), 6)),
        ({}, {"bos": -1, "eos": 99, "pad": 99}, (1, (2,), 0)),
        ({}, {"eos": [99, 5]}, (1, (5,), 0)),
    ],
)
def test_tokens(
    config: dict[str, Any], generation: dict[str, Any], expected: tuple[Any, ...], checkpoint: Path
) -> None:
    _name(checkpoint / "config.json", **config)
    if generation:
        _name(checkpoint / "generation_config.json", **generation)
    assert _found(checkpoint) == expected


@pytest.mark.parametrize("tokens", [{"eos": [2, "x"]}, {"bos": [1]}, {"pad": 1.5}, {"eos": True}])
def test_what_is_no_number_is_refused(tokens: dict[str, Any], checkpoint: Path) -> None:
    _name(checkpoint / "generation_config.json", **tokens)
    with pytest.raises(CheckpointError, match=r"which is no token number; correct generation_"):
        _found(checkpoint)


@pytest.mark.parametrize("pad", [-1, VOCAB_SIZE, 10**6])
@torch.no_grad()
def test_models_load_without_them(pad: int, checkpoint: Path, tmp_path: Path) -> None:
    """transformers fails on some, and trains no gradient for the last token with -1."""
    _name(checkpoint / "config.json", pad=pad, eos=[2, pad])
    _name(checkpoint / "generation_config.json", pad=pad, eos=[2, pad])
    teacher = load_teacher(checkpoint)
    assert teacher.get_input_embeddings().padding_idx is None
    for named in (teacher.config, teacher.generation_config):
        assert [getattr(named, name) for name in NAMES[1:]] == [[2], None]
    student = load_shared(checkpoint, SharingPlan((0, 0)))
    save_student(student, tmp_path / "student", checkpoint)
    # And so a student of an earlier version, which took them over
    path = tmp_path / "student" / "config.json"
    saved = json.loads(path.read_text())
    saved["text_config"]["pad_token_id"] = saved["pad_token_id"] = pad
    path.write_text(json.dumps(saved))
    again = load_shared(tmp_path / "student", None)
    assert again.config.pad_token_id is None
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(again(tokens).logits, student(tokens).logits)
