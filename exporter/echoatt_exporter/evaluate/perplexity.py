"""Losses of a text's tokens with a sliding window, of one model or of two in lockstep.

Shapes in names: N scored tokens, R rows (scored tokens) at once, K numbers a token, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from echoatt_exporter.errors import AnalysisError, TextError
from echoatt_exporter.evaluate.models import TextModel, WindowBatch
from echoatt_exporter.evaluate.score import TextComparison, TextScore
from echoatt_exporter.texts import Text, encode_texts, leading_tokens
from echoatt_runtime.executor import PREFILL_CHUNK
from echoatt_runtime.measures import kl_divergence, log_probabilities, same_top_token

# Logits are made for as many tokens at once as keep one float32 table below this many elements
_LOGITS_AT_ONCE = 1 << 23

OnProgress = Callable[[int, int], None]
# From every model's logits [R, V], and the tokens that came [R], to K numbers [R]
_Measure = Callable[
    [Sequence[NDArray[np.float32]], NDArray[np.int64]], Sequence[NDArray[np.floating | np.bool_]]
]


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Documents as a model's tokens.

    Attributes:
        lead: Special tokens that open every window.
        documents: The ids, int64 [tokens], of each document that has some to score.
        skipped: Tokens at the start of a document that are not scored.
        bytes: Of what is scored, UTF-8.
    """

    lead: list[int]
    documents: list[NDArray[np.int64]]
    skipped: int
    bytes: int

    @property
    def scored(self) -> NDArray[np.int64]:
        """The ids of all N tokens to score."""
        return np.concatenate([document[self.skipped :] for document in self.documents])

    @property
    def origins(self) -> NDArray[np.int64]:
        """Which of the N tokens each document's token 0 is, or would be if it were scored."""
        ends = np.cumsum([len(document) - self.skipped for document in self.documents])
        return np.array([0, *ends[:-1]], np.int64) - self.skipped

    @property
    def digest(self) -> str:
        """SHA-256 of the scored tokens' ids."""
        return hashlib.sha256(self.scored.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens `begin` to `end` of a document, of which those from `first` on are scored."""

    document: int
    begin: int
    first: int
    end: int


def score_documents(
    model: TextModel,
    documents: Sequence[Text],
    *,
    length: int,
    stride: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> TextScore:
    """Score every token of every document once, each document by itself.

    A window of `length` tokens moves on by `stride`, and in each the tokens that no earlier
    window had are scored: every token is predicted from at least `length - stride` tokens before
    it where the document has them. The tokenizer's leading special tokens, such as `<s>`, open
    every window and count as a part of it; without any, a document's first token has nothing before
    it and is not scored, nor are its bytes counted.

    Args:
        model: What is scored, with its tokenizer.
        documents: The texts.
        length: Tokens in a window, at most the model's context.
        stride: New tokens a window.
        batch_size: Windows run at once; logits are made for some thousand of their tokens at once.
        max_tokens: Stop after so many scored tokens; None scores all.
        on_progress: Told (tokens scored, tokens to score) after every batch.

    Raises:
        AnalysisError: A length or a stride that cannot be, token ids that the model lacks, or a
            loss that is not a number.
        TextError: There is no token to score.
    """
    _check([model], batch_size, max_tokens)
    tokens = _tokenise(documents, model.tokenizer, max_tokens)
    (nats_N,) = _sweep([model], tokens, _losses, 1, length, stride, batch_size, on_progress)
    return TextScore(nats_N, tokens.bytes, tokens.digest)


def compare_documents(
    model: TextModel,
    reference: TextModel,
    documents: Sequence[Text],
    *,
    length: int,
    stride: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> TextComparison:
    """Score two models in one pass, and hold their predictions of every token against each other.

    Both run the windows of `score_documents` in lockstep, so that both models' logits exist
    for some thousand tokens at once, however long the text is.

    Args:
        model: What is judged: a student, or a quantised bundle.
        reference: What it is held against: its teacher, or the bundle in fp32.
        documents: The texts.
        length: Tokens in a window, at most either model's context.
        stride: As in `score_documents`, and so are the others.
        batch_size: Windows run at once.
        max_tokens: Stop after so many scored tokens.
        on_progress: Told (tokens scored, tokens to score).

    Raises:
        AnalysisError: As in `score_documents`, or the models differ in their vocabulary or in
            the tokens that the text is to them.
        TextError: There is no token to score.
    """
    models = (model, reference)
    _check(models, batch_size, max_tokens)
    tokens, others = (_tokenise(documents, one.tokenizer, max_tokens) for one in models)
    if (tokens.lead, tokens.digest) != (others.lead, others.digest):
        raise AnalysisError(
            "the text is other tokens to either model; compare models with the same tokenizer"
        )
    nats_N, reference_N, divergence_N, agreement_N = _sweep(
        models, tokens, _comparisons, 4, length, stride, batch_size, on_progress
    )
    return TextComparison(
        TextScore(nats_N, tokens.bytes, tokens.digest),
        TextScore(reference_N, tokens.bytes, tokens.digest),
        divergence_N,
        agreement_N.astype(np.bool_),
    )


def _check(models: Sequence[TextModel], batch_size: int, max_tokens: int | None) -> None:
    for name, count in (("batch size", batch_size), ("maximum of tokens", max_tokens)):
        if count is not None and count < 1:
            raise AnalysisError(f"a {name} of {count} leaves nothing to do; give 1 or more")
    sizes = [model.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise AnalysisError(
            f"vocabularies of {' and '.join(map(str, sizes))} tokens do not fit together; compare"
            " models with the same one"
        )


def _check_windows(models: Sequence[TextModel], tokens: _Tokens, length: int, stride: int) -> None:
    context = min(model.context_length for model in models)
    if not 2 <= length <= context:
        raise AnalysisError(
            f"windows of {length} tokens are outside what the model was made for; give 2 to"
            f" {context}"
        )
    most = length - max(1, len(tokens.lead))
    if not 1 <= stride <= most:
        raise AnalysisError(
            f"a stride of {stride} tokens does not fit windows of {length}, in which a token needs"
            f" another before it; give 1 to {most}"
        )
    highest = max(int(document.max()) for document in tokens.documents)
    if highest >= models[0].vocab_size:
        raise AnalysisError(
            f"token id {highest} is outside the model's vocabulary of {models[0].vocab_size};"
            " use the model's own tokenizer"
        )


def _tokenise(
    documents: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> _Tokens:
    """The documents' tokens, as many of them as are to be scored."""
    lead = leading_tokens(tokenizer)
    skipped = 0 if lead else 1
    rows: list[NDArray[np.int64]] = []
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
        rows.append(row.numpy())
        size += len(read.encode()) - len(_decode(tokenizer, row[:skipped]).encode())
        left = None if left is None else left - len(scored)
    if not rows:
        raise TextError("no token to score: no document has two tokens; give longer texts")
    return _Tokens(lead, rows, skipped, size)


def _decode(tokenizer: PreTrainedTokenizerBase, row: torch.Tensor) -> str:
    return cast(str, tokenizer.decode(row, clean_up_tokenization_spaces=False))


def _windows(tokens: _Tokens, width: int, stride: int) -> Iterator[_Window]:
    """The windows of `width` tokens over all documents, a document's first the shorter."""
    for index, document in enumerate(tokens.documents):
        end = min(width, len(document))
        yield _Window(index, 0, tokens.skipped, end)
        while end < len(document):
            first, end = end, min(end + stride, len(document))
            yield _Window(index, end - width, first, end)


def _sweep(
    models: Sequence[TextModel],
    tokens: _Tokens,
    measure: _Measure,
    numbers: int,
    length: int,
    stride: int,
    batch_size: int,
    on_progress: OnProgress | None,
) -> NDArray[np.float32]:
    """What is measured of every scored token, in the order of the text: [K, N]."""
    _check_windows(models, tokens, length, stride)
    windows = list(_windows(tokens, length - len(tokens.lead), stride))
    windows.sort(key=lambda window: window.begin - window.end)  # long ones first: little padding
    vocab_size = models[0].vocab_size
    chunk = max(1, min(PREFILL_CHUNK, _LOGITS_AT_ONCE // (batch_size * vocab_size)))
    scored_N = tokens.scored
    # Made beforehand: small tables that outlive large ones keep malloc from reusing their place
    values_KN = np.full((numbers, len(scored_N)), np.nan, np.float32)
    done = 0
    for at in range(0, len(windows), batch_size):
        for place_R, logits in _run(models, tokens, windows[at : at + batch_size], chunk):
            found = measure(logits, scored_N[place_R])
            for value_N, value_R in zip(values_KN, found, strict=True):
                value_N[place_R] = value_R
            done += len(place_R)
        if on_progress is not None:
            on_progress(done, len(scored_N))
    if not np.isfinite(values_KN).all():
        raise AnalysisError("the model's loss is not a number: it overflows; try float32")
    return values_KN


def _run(
    models: Sequence[TextModel], tokens: _Tokens, windows: Sequence[_Window], chunk: int
) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.float32]]]]:
    """For some scored tokens after others, which of the N they are, and all models' logits."""
    lead = tokens.lead
    # A token is predicted at the position before it, and a window's last one is only predicted
    batch = WindowBatch(
        [[*lead, *tokens.documents[w.document][w.begin : w.end - 1].tolist()] for w in windows],
        [len(lead) + w.first - w.begin - 1 for w in windows],
        chunk,
    )
    # Which of the N the token that is predicted at position 0 would be
    starts = tokens.origins
    origins = [starts[w.document] + w.begin + 1 - len(lead) for w in windows]
    streams = [model.logits(batch) for model in models]
    for wanted, *logits in zip(batch.wanted(), *streams, strict=True):
        place_R = np.concatenate(
            [
                np.arange(positions.start, positions.stop) + origin
                for positions, origin in zip(wanted, origins, strict=True)
            ]
        )
        yield place_R, [logits_RV.cpu().numpy() for logits_RV in logits]


def _losses(
    logits: Sequence[NDArray[np.float32]], target_R: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Each model's loss."""
    return [-log_probabilities(logits_RV, target_R) for logits_RV in logits]


def _comparisons(
    logits: Sequence[NDArray[np.float32]], target_R: NDArray[np.int64]
) -> list[NDArray[np.float64] | NDArray[np.bool_]]:
    """Both models' losses, how far the first is from the second, and 1 where their tops agree."""
    model_RV, reference_RV = logits
    return [
        *_losses(logits, target_R),
        kl_divergence(reference_RV, model_RV),
        same_top_token(reference_RV, model_RV),
    ]
