"""Losses of a text's tokens with a sliding window.

Shapes in names: B windows at once, T tokens of a window, E hidden size, R rows (scored tokens) at
once, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echoatt_exporter.architecture import DecoderArchitecture, architecture_of
from echoatt_exporter.errors import AnalysisError, TextError
from echoatt_exporter.evaluate.score import (
    Interval,
    ScoreRatio,
    TextScore,
    compare_scores,
    mean_interval,
)
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM, MaterializedAttention
from echoatt_exporter.texts import Text, encode_texts, leading_tokens

__all__ = [
    "Interval",
    "ScoreRatio",
    "TextScore",
    "compare_scores",
    "mean_interval",
    "score_documents",
]

# Logits are made for as many tokens at once as keep one float32 table below this many elements
_LOGITS_AT_ONCE = 1 << 22

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens ``begin`` to ``end`` of a document, of which those from ``first`` on are scored."""

    document: int
    begin: int
    first: int
    end: int


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    documents: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    stride: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> TextScore:
    """Score every token of every document once, each document by itself.

    A window of ``length`` tokens moves on by ``stride``, and in each the tokens that no earlier
    window had are scored: every token is predicted from at least ``length - stride`` tokens before
    it where the document has them. The tokenizer's leading special tokens, such as ``<s>``, open
    every window and count as a part of it; without any, a document's first token has nothing before
    it and is not scored, nor are its bytes counted.

    Args:
        model: a teacher or a student, in evaluation mode, on any device.
        documents: the texts.
        tokenizer: the model's own.
        length: tokens in a window, at most the model's context.
        stride: new tokens a window.
        batch_size: windows run at once; logits are made for some thousand of their tokens at once.
        max_tokens: stop after so many scored tokens; None scores all.
        on_progress: told (tokens scored, tokens to score) after every batch.

    Raises:
        AnalysisError: a length or a stride that cannot be, token ids that the model lacks, or a
            loss that is not a number.
        TextError: there is no token to score.
    """
    architecture = architecture_of(model.config.get_text_config())
    lead = leading_tokens(tokenizer)
    _check(architecture, len(lead), length, stride, batch_size, max_tokens)
    skipped = 0 if lead else 1
    rows, size = _encode(documents, tokenizer, skipped, max_tokens)
    if (highest := max(int(row.max()) for row in rows)) >= architecture.vocab_size:
        raise AnalysisError(
            f"token id {highest} is outside the model's vocabulary of {architecture.vocab_size};"
            " use the model's own tokenizer"
        )
    starts = np.cumsum([0, *(len(row) - skipped for row in rows)])
    windows = [
        window
        for index, row in enumerate(rows)
        for window in _windows(index, len(row), skipped, length - len(lead), stride)
    ]
    windows.sort(key=lambda window: window.begin - window.end)  # long ones first: little padding
    nats = np.empty(starts[-1], dtype=np.float32)
    done = 0
    for at in range(0, len(windows), batch_size):
        batch = windows[at : at + batch_size]
        for window, losses in zip(batch, _losses(model, batch, rows, lead), strict=True):
            start = starts[window.document] + window.first - skipped
            nats[start : start + len(losses)] = losses
            done += len(losses)
        if on_progress is not None:
            on_progress(done, len(nats))
    if not np.isfinite(nats).all():
        raise AnalysisError("the model's loss is not a number: it overflows; try float32")
    scored = np.concatenate([row[skipped:].numpy() for row in rows])
    return TextScore(nats, size, hashlib.sha256(scored.astype("<i8").tobytes()).hexdigest())


def _check(
    architecture: DecoderArchitecture,
    lead: int,
    length: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None,
) -> None:
    if not 2 <= length <= architecture.context_length:
        raise AnalysisError(
            f"windows of {length} tokens are outside what the model was made for; give 2 to"
            f" {architecture.context_length}"
        )
    most = length - max(1, lead)
    if not 1 <= stride <= most:
        raise AnalysisError(
            f"a stride of {stride} tokens does not fit windows of {length}, in which a token needs"
            f" another before it; give 1 to {most}"
        )
    for name, count in (("batch size", batch_size), ("maximum of tokens", max_tokens)):
        if count is not None and count < 1:
            raise AnalysisError(f"a {name} of {count} leaves nothing to do; give 1 or more")


def _encode(
    documents: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    skipped: int,
    max_tokens: int | None,
) -> tuple[list[torch.Tensor], int]:
    """Token ids [tokens] of each document that has some to score, and the bytes of these tokens.

    Args:
        documents: the texts.
        tokenizer: the model's own.
        skipped: tokens at the start of a document that are not scored.
        max_tokens: to score.
    """
    rows: list[torch.Tensor] = []
    size, left = 0, max_tokens
    for document in documents:
        if left == 0:
            break
        (whole,) = encode_texts([document], tokenizer)
        row = whole if left is None else whole[: skipped + left]
        scored = row[skipped:]
        if not len(scored):
            continue
        read = document.content if len(row) == len(whole) else _decode(tokenizer, row)
        rows.append(row)
        size += len(read.encode()) - len(_decode(tokenizer, row[:skipped]).encode())
        left = None if left is None else left - len(scored)
    if not rows:
        raise TextError("no token to score: no document has two tokens; give longer texts")
    return rows, size


def _decode(tokenizer: PreTrainedTokenizerBase, row: torch.Tensor) -> str:
    return cast(str, tokenizer.decode(row, clean_up_tokenization_spaces=False))


def _windows(
    document: int, tokens: int, skipped: int, width: int, stride: int
) -> Iterator[_Window]:
    """The windows of ``width`` tokens over a document, the first of them the shorter of the two."""
    end = min(width, tokens)
    yield _Window(document, 0, skipped, end)
    while end < tokens:
        first, end = end, min(end + stride, tokens)
        yield _Window(document, end - width, first, end)


def _losses(
    model: PreTrainedModel, batch: Sequence[_Window], rows: Sequence[torch.Tensor], lead: list[int]
) -> Iterator[NDArray[np.float32]]:
    """The losses [tokens] of each window's scored tokens."""
    longest = max(window.end - window.begin for window in batch)
    ids_BT = torch.zeros((len(batch), len(lead) + longest), dtype=torch.int64)
    # the position whose output predicts a token is the one before it
    scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, window in enumerate(batch):
        tokens = torch.cat(
            [
                torch.tensor(lead, dtype=torch.int64),
                rows[window.document][window.begin : window.end],
            ]
        )
        # What stands after a token does not reach it: padding needs no mask
        ids_BT[index, : len(tokens)] = tokens
        first = len(lead) + window.first - window.begin
        scored_BT[index, first - 1 : len(tokens) - 1] = True
    device = model.device
    decoder, hidden_BTE = _hidden_states(model, ids_BT.to(device))
    hidden_RE = hidden_BTE[scored_BT.to(device)]
    target_R = ids_BT.roll(-1, dims=1)[scored_BT].to(device)
    at_once = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)
    parts = zip(torch.split(hidden_RE, at_once), torch.split(target_R, at_once), strict=True)
    head = head_of(decoder)
    losses = [
        F.cross_entropy(head(part_RE[None])[0].float(), target, reduction="none").cpu()
        for part_RE, target in parts
    ]
    counts = [window.end - window.first for window in batch]
    for part in torch.split(torch.cat(losses), counts):
        yield part.numpy()


def _hidden_states(
    model: PreTrainedModel, ids_BT: torch.Tensor
) -> tuple[PreTrainedModel, torch.Tensor]:
    """The decoder that has the LM head, and its output [B, T, E] after its last norm."""
    decoder, arguments = model, dict[str, Any]()
    if isinstance(model, EchoAttForCausalLM):
        decoder = model.decoder
        arguments["shared_attention"] = MaterializedAttention(model.sources)
    body = getattr(decoder, decoder.base_model_prefix)
    output = body(input_ids=ids_BT, use_cache=False, **arguments)
    return decoder, output.last_hidden_state
