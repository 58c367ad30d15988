"""A tiny teacher with a tokenizer, a student of it, and text that can be learnt."""

from __future__ import annotations

import os

# Read when matplotlib is first imported
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import build_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from echoatt_exporter import SharingPlan, load_shared
from echoatt_exporter.share.save import save_student

WORDS = 58


def save_teacher(directory: Path, **fields: Any) -> Path:
    """A teacher of 3 layers whose tokenizer has the words `w0` to `w57` and an end of text."""
    build_tiny_model("llama", num_hidden_layers=3, **fields).save_pretrained(directory)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def save_student_of(teacher: Path, directory: Path) -> Path:
    """The teacher with its last layer following the one before."""
    save_student(load_shared(teacher, SharingPlan((0, 1, 1))), directory, teacher)
    return directory


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher; its dropout is on in training, so that random numbers matter."""
    return save_teacher(tmp_path_factory.mktemp("distill") / "teacher", attention_dropout=0.1)


@pytest.fixture(scope="session")
def student_dir(teacher_dir: Path) -> Path:
    """The student."""
    return save_student_of(teacher_dir, teacher_dir.parent / "student")


@pytest.fixture(scope="session")
def text_file(teacher_dir: Path) -> Path:
    """Two documents of 115 words, each word deciding the next one: 14 rows of 16 tokens."""
    words = [1]
    for _ in range(229):
        words.append((words[-1] * 7 + 3) % WORDS)
    for number in range(2):
        document = " ".join(f"w{word}" for word in words[number * 115 :][:115])
        folder = teacher_dir.parent / "text"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(document)
    return folder
