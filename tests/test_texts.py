"""Texts: what is read, what is refused, and how windows are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from echoatt_exporter.errors import CheckpointError, TextError
from echoatt_exporter.texts import (
    Text,
    encode_texts,
    leading_tokens,
    load_tokenizer,
    read_texts,
    sample_windows,
    texts_digest,
)


def _tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words `w0` to `w99` are tokens 3 to 102; `template` surrounds a text."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _words(first: int, count: int) -> Text:
    return Text(f"from {first}", " ".join(f"w{n}" for n in range(first, first + count)))


def test_every_kind_of_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("# Héad\n\n*marks* stay\n", encoding="utf-8")
    lines = [{"text": "one\u2028line", "label": 1}, {"text": "  "}, {"text": "two"}]
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    named = read_texts([tmp_path / name for name in ("b.md", "a.txt", "c.jsonl")])
    assert [text.content for text in named] == [
        "# Héad\n\n*marks* stay\n",
        "plain\n",
        "one\u2028line",
        "two",
    ]
    assert named[-1].name == f"{tmp_path / 'c.jsonl'}:3"
    in_folder = read_texts([tmp_path])
    assert [Path(text.name).name for text in in_folder] == [
        "a.txt",
        "b.md",
        "c.jsonl:1",
        "c.jsonl:3",
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = '{"text": "one"}\n{"text": "two\\n"}\n'
    for name, content in (("a.txt", "Héad\r\n"), ("b.md", "\ufeff"), ("c.jsonl", lines)):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        (tmp_path / f"marked-{name}").write_text(content, encoding="utf-8-sig", newline="")
    for name in ("a.txt", "c.jsonl"):
        plain, marked = (read_texts([tmp_path / f"{kind}{name}"]) for kind in ("", "marked-"))
        assert [text.content for text in marked] == [text.content for text in plain]
        assert texts_digest(marked) == texts_digest(plain)
    # Only the first one is a mark
    assert read_texts([tmp_path / "marked-b.md"])[0].content == "\ufeff"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"absent\.txt: cannot be read \(No such file"),
        ("a.pdf", b"%PDF", r"a\.pdf: not a kind of text file .* give \.txt, \.md"),
        ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 text \(byte 2\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"texts": "x"}', r'a\.jsonl:1: no string "text"'),
        ("a.jsonl", b"[1]", r'a\.jsonl:1: no string "text"'),
        ("a.jsonl", b'{"text": "a\\ud83d"}', r"a\.jsonl:1: no Unicode text \(character 1 is"),
        ("a.txt", b"\xff\xfea\0", r"a\.txt: not UTF-8 text \(byte 0\)"),
        ("a.txt", b"\xef\xbb\xbf\n", r"no text in .*a\.txt"),
        ("a.md", b" \n", r"no text in .*a\.md; give files"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_texts([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no \.txt, \.md, \.markdown, \.jsonl file"):
        read_texts([tmp_path])


def test_the_digest_is_of_contents_and_their_borders() -> None:
    one = texts_digest([Text("a", "xy"), Text("b", "z")])
    assert one == texts_digest([Text("c", "xy"), Text("d", "z")])
    assert one != texts_digest([Text("a", "x"), Text("b", "yz")])


@pytest.mark.parametrize(
    ("template", "lead"),
    [(None, []), ("<s> $A", [1]), ("<s> <s> $A </s>", [1, 1]), ("$A </s>", [])],
)
def test_leading_tokens(template: str | None, lead: list[int]) -> None:
    assert leading_tokens(_tokenizer(template)) == lead


def test_windows_are_exact_and_take_every_documents_start_first() -> None:
    texts = [_words(0, 11), _words(20, 7), _words(40, 2), _words(60, 4)]
    windows = sample_windows(texts, _tokenizer("<s> $A"), length=4, count=9, seed=3)
    # 3 words a window after <s>: 3 + 2 + 0 + 1 windows
    starts = [int(row[1]) - 3 for row in windows]
    assert windows.shape == (6, 4)
    assert set(starts[:3]) == {0, 20, 60}
    assert set(starts[3:5]) == {3, 23}
    assert starts[5] == 6
    for row, start in zip(windows, starts, strict=True):
        assert row.tolist() == [1, start + 3, start + 4, start + 5]


def test_the_seed_chooses_among_documents() -> None:
    texts = [_words(n, 3) for n in range(0, 60, 3)]
    tokenizer = _tokenizer()
    first, again, other = (
        sample_windows(texts, tokenizer, length=3, count=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(TextError, match=r"the 9 tokens that a window of 10 takes .* has 5\)"):
        sample_windows([_words(0, 5)], _tokenizer("<s> $A"), length=10, count=1)
    with pytest.raises(TextError, match="leave no room"):
        sample_windows([_words(0, 5)], _tokenizer("<s> $A"), length=1, count=1)


def test_encoding_adds_no_special_tokens() -> None:
    (row,) = encode_texts([_words(0, 3)], _tokenizer("<s> $A </s>"))
    assert row.dtype == torch.int64
    assert row.tolist() == [3, 4, 5]


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer, and text needs one") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
