"""Texts to rows, and rows to stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echoatt_exporter.distill.data import pack_rows, split_stages
from echoatt_exporter.errors import TextError
from echoatt_exporter.texts import Text, load_tokenizer

TEXTS = [Text("a", "w0 w1 w2"), Text("b", "w3 w4 w5 w6 w7")]


def test_documents_are_joined_with_the_end_of_text_between(teacher_dir: Path) -> None:
    tokenizer = load_tokenizer(teacher_dir)
    assert pack_rows(TEXTS, tokenizer, 4).tolist() == [[3, 4, 5, 2], [6, 7, 8, 9]]
    tokenizer.eos_token = None
    assert pack_rows(TEXTS, tokenizer, 4).tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_leading_tokens_open_every_row(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echoatt_exporter.distill.data.leading_tokens", lambda _: [1])
    tokenizer = load_tokenizer(teacher_dir)
    assert pack_rows(TEXTS, tokenizer, 4).tolist() == [[1, 3, 4, 5], [1, 2, 6, 7], [1, 8, 9, 10]]
    with pytest.raises(TextError, match="rows of 1 tokens leave no room"):
        pack_rows(TEXTS, tokenizer, 1)


def test_stage_2_gets_new_rows_where_there_are_enough() -> None:
    rows = torch.arange(11)[:, None].expand(-1, 2)

    def numbers(steps: tuple[int, int], seed: int = 0) -> list[set[int]]:
        return [set(stage.rows[:, 0].tolist()) for stage in split_stages(rows, steps, 2, seed)]

    first, second = numbers((3, 2))
    assert (len(first), len(second), first & second) == (6, 4, set())
    assert numbers((3, 2)) == [first, second]
    assert numbers((3, 2), seed=1) != [first, second]
    # not enough: both read all whole steps
    first, second = numbers((3, 3))
    assert first == second
    assert len(first) == 10


def test_too_little_text_for_one_step() -> None:
    with pytest.raises(
        TextError, match=r"makes 3 rows of 2 tokens and one step takes 4; give more"
    ):
        split_stages(torch.zeros(3, 2, dtype=torch.int64), (1, 1), 4, 0)
