"""Texts to rows of exactly one length, and rows to stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from echoatt_exporter.errors import TextError
from echoatt_exporter.texts import Text, encode_texts, leading_tokens


class TokenRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of token ids, in the form that `transformers.Trainer` takes.

    Attributes:
        rows: Int64 [rows, length].
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def pack_rows(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, length: int
) -> torch.Tensor:
    """Documents one after the other, cut into rows.

    Args:
        texts: The documents. The tokenizer's end of text stands after each, if it has one; what is
            left after the last whole row is not used.
        tokenizer: Its leading special tokens open every row and count.
        length: Tokens of a row.

    Returns:
        int64 [rows, length]; no rows where there is too little text.

    Raises:
        TextError: The length leaves no room for text.
    """
    lead = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    width = length - len(lead)
    if width < 1:
        raise TextError(f"rows of {length} tokens leave no room for text; make them longer")
    end: int | None = tokenizer.eos_token_id
    close = torch.tensor([] if end is None else [end], dtype=torch.int64)
    pieces = [piece for document in encode_texts(texts, tokenizer) for piece in (document, close)]
    stream = torch.cat(pieces)
    count = len(stream) // width
    rows = stream[: count * width].view(count, width)
    return torch.cat([lead.expand(count, -1), rows], dim=1)


def split_stages(
    rows: torch.Tensor, steps: tuple[int, int], rows_a_step: int, seed: int
) -> tuple[TokenRows, TokenRows]:
    """Deal rows out to the two stages.

    Args:
        rows: Int64 [rows, length].
        steps: Optimiser steps of stage 1 and of stage 2.
        rows_a_step: Rows that all processes together take in one step.
        seed: Of the order in which rows are dealt out.

    Returns:
        The rows of each stage, whole steps of them. Stage 2 gets rows that stage 1 has not seen
        where there are enough for both; otherwise each stage reads all rows, as often as it takes.

    Raises:
        TextError: The rows do not fill one step.
    """
    whole = len(rows) // rows_a_step * rows_a_step
    if not whole:
        raise TextError(
            f"too little text: it makes {len(rows)} rows of {rows.shape[1]} tokens and one step"
            f" takes {rows_a_step}; give more text, or a smaller batch or length"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:whole]
    first, second = (count * rows_a_step for count in steps)
    if first + second > whole:
        return TokenRows(rows[order]), TokenRows(rows[order])
    return TokenRows(rows[order[:first]]), TokenRows(rows[order[first : first + second]])
