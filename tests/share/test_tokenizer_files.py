"""A checkpoint's tokenizer is its `tokenizer.json`, whatever transformers makes of its class."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import build_tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from echoatt_exporter import load_shared, save_student
from echoatt_exporter.distill.data import pack_rows
from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.tokenizer_files import open_tokenizer, save_tokenizer
from echoatt_exporter.texts import Text, encode_texts
from echoatt_runtime.text import TextTokenizer

TEXT = "Steps:\n\n1. Mix"
END = "<|endoftext|>"
LINES = ["Steps:\n\n1. Mix\n\n2. Bake\n\n3. Eat\n" * 50, "12345 67890 2023 " * 50]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, with blank lines as a token, which GPT-2's own way to split rules out."""
    found = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    found.train_from_iterator(LINES, trainer)
    return found


@pytest.fixture
def checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A Llama whose configuration names GPT-2's tokenizer."""
    directory = tmp_path / "checkpoint"
    build_tiny_model("llama", num_hidden_layers=2, vocab_size=300).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    _describe(directory, tokenizer_class="GPT2Tokenizer", eos_token=END)
    return directory


def _describe(directory: Path, **fields: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def test_the_file_is_copied_as_it_is_and_read_by_itself(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = tokenizer.encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"] != expected
    student = tmp_path / "student"
    (note,) = save_student(load_shared(checkpoint, "1:0"), student, checkpoint)
    assert "GPT2Tokenizer, which transformers makes for it, gives other tokens" in note
    assert "\n" not in note
    file = "tokenizer.json"
    assert (student / file).read_bytes() == (checkpoint / file).read_bytes()
    for directory in (checkpoint, student):
        ours = open_tokenizer(directory)
        assert encode_texts([Text("", TEXT)], ours)[0].tolist() == expected
        assert TextTokenizer.from_directory(directory).encode(TEXT) == expected
        assert ours.decode(expected) == TEXT
    # Plain transformers reads it too from then on, and there is nothing more to say
    assert AutoTokenizer.from_pretrained(student)(TEXT)["input_ids"] == expected
    assert save_tokenizer(student, tmp_path) == []


def test_padding_and_truncation_of_its_training_are_left_out(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    path = checkpoint / "tokenizer.json"
    other = Tokenizer.from_file(str(path))
    other.enable_padding(length=64, pad_id=0, pad_token=END)
    other.enable_truncation(max_length=2)
    other.save(str(path))
    texts = [Text("", TEXT), Text("", TEXT * 3)]
    rows = [row.tolist() for row in encode_texts(texts, open_tokenizer(checkpoint))]
    assert rows == [tokenizer.encode(text.content).ids for text in texts]


@pytest.mark.parametrize(
    ("described", "mapped", "number", "expected"),
    [
        ({"eos_token": END}, {}, None, 0),
        ({"eos_token": {"content": END, "lstrip": False}}, {}, None, 0),
        ({}, {"eos_token": END}, None, 0),
        # GPT-2's files do not name it
        ({}, {}, 0, 0),
        ({}, {}, 10**6, None),
        ({"eos_token": "<gone>"}, {}, None, None),
    ],
)
def test_the_end_of_text_is_found(
    described: dict[str, Any],
    mapped: dict[str, Any],
    number: int | None,
    expected: int | None,
    checkpoint: Path,
    tokenizer: Tokenizer,
) -> None:
    _describe(checkpoint, **described)
    (checkpoint / "special_tokens_map.json").write_text(json.dumps(mapped))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": number}))
    ours = open_tokenizer(checkpoint)
    assert ours.eos_token_id == expected
    ids = tokenizer.encode(TEXT).ids
    close = [] if expected is None else [expected]
    assert pack_rows([Text("", TEXT)], ours, len(ids + close)).tolist() == [ids + close]


def test_what_lies_in_older_files_is_taken_over(checkpoint: Path, tmp_path: Path) -> None:
    """Special tokens in a file of their own, a chat template in the configuration."""
    _describe(checkpoint, tokenizer_class="GPT2Tokenizer", chat_template="{{ bos_token }}!")
    (checkpoint / "special_tokens_map.json").write_text(json.dumps({"bos_token": END}))
    save_tokenizer(checkpoint, tmp_path)
    ours = TextTokenizer.from_directory(tmp_path)
    assert ours.special_tokens["bos_token"] == END
    assert ours.chat_template == "{{ bos_token }}!"


def test_a_template_is_copied_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(b"{{ 1 }}\r\n")
    save_tokenizer(checkpoint, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == b"{{ 1 }}\r\n"


def test_code_beside_it_is_not_needed(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _describe(checkpoint, auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]})
    (checkpoint / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert save_tokenizer(checkpoint, tmp_path) == []
    assert not (tmp_path / "ran").exists()
    ours = open_tokenizer(checkpoint)
    assert encode_texts([Text("", TEXT)], ours)[0].tolist() == tokenizer.encode(TEXT).ids


# Without tokenizer.json


@pytest.mark.parametrize(
    ("content", "package"),
    [
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "sentencepiece"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_a_package_that_the_vocabulary_needs_is_named(
    content: bytes, package: str, checkpoint: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed, and reads the vocabulary")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(content)
    for read in (open_tokenizer, lambda path: save_tokenizer(path, tmp_path)):
        with pytest.raises(CheckpointError, match=rf"is not installed: pip install {package};"):
            read(checkpoint)


def test_vocabulary_and_merges_become_a_file(checkpoint: Path, tmp_path: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (checkpoint / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    assert save_tokenizer(checkpoint, tmp_path) == []
    expected = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    assert TextTokenizer.from_directory(tmp_path).encode(TEXT) == expected
    assert open_tokenizer(checkpoint)(TEXT)["input_ids"] == expected


def test_a_tokenizer_without_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="its tokenizer has no vocabulary; download"):
        save_tokenizer(checkpoint, tmp_path)


def test_one_that_is_code_only_is_called_that(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    _describe(checkpoint, tokenizer_class="ByT5Tokenizer")
    (note,) = save_tokenizer(checkpoint, tmp_path)
    assert "no tokenizer.json can be made; a bundle of it runs on token ids" in note
    assert len(open_tokenizer(checkpoint)("abc", add_special_tokens=False)["input_ids"]) == 3
