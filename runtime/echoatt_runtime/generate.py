"""Generation in layers: a batch's steps over tokens, then text streamed from one row or joined.

Shapes: B rows still at work, S new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache.kv_cache import KVCache, bucket_capacity
from echoatt_runtime.errors import ContextOverflowError, PromptError
from echoatt_runtime.executor.session import Session
from echoatt_runtime.executor.step_buffers import Integers, Logits
from echoatt_runtime.results import FinishReason, GenerationResult, TextPiece, Timings
from echoatt_runtime.sampling import Sampler, SamplingParams
from echoatt_runtime.text.text_stream import Detokenizer, StopMatcher
from echoatt_runtime.text.tokenizer import TextTokenizer

# Probabilities take chunk x capacity: small chunks save memory, large ones feed the cores.
PREFILL_CHUNK: Final = 256


@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of every prompt, padded on the right where prompts end.

    Attributes:
        token_ids: [B, S].
        past_lengths: Tokens of each prompt before the slice, [B].
        lengths: Tokens of each prompt in the slice, [B]; 0 where it ended before.
    """

    token_ids: Integers
    past_lengths: Integers
    lengths: Integers


def iter_chunks(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Chunk]:
    """Cuts prompts of any lengths into chunks of at most `size` tokens."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    longest = int(lengths.max())
    for start in range(0, longest, size):
        token_ids = np.zeros((len(prompts), min(size, longest - start)), np.int64)
        for row, prompt in enumerate(prompts):
            tokens = prompt[start : start + size]
            token_ids[row, : len(tokens)] = tokens
        past_lengths = np.minimum(lengths, start)
        yield Chunk(token_ids, past_lengths, np.clip(lengths - start, 0, size))


def run_chunk(session: Session, cache: KVCache, chunk: Chunk, logits_indices: Integers) -> Logits:
    """Run one chunk, after making room for it; returns the logits, [B, n, V]."""
    valid = int(chunk.past_lengths.max())
    cache.reserve(valid + chunk.token_ids.shape[1], valid)
    return session.run(cache, chunk.token_ids, chunk.past_lengths, logits_indices)


def prefill(
    session: Session,
    prompts: Sequence[Sequence[int]],
    limit: int,
    chunk_size: int = PREFILL_CHUNK,
) -> tuple[KVCache, npt.NDArray[np.float32]]:
    """Run whole prompts.

    Args:
        session: The bundle's session.
        prompts: Tokens of each prompt, at least one.
        limit: Most tokens that a row will hold, the generated ones with it.
        chunk_size: Most tokens to run at once.

    Returns:
        The filled cache, and the logits of every prompt's next token, [B, V].
    """
    manifest = session.manifest
    longest = max(len(prompt) for prompt in prompts)
    # On the CPU attention pays for the whole buffer and growing is cheap, so it starts small; from
    # other devices growing goes through the host, so there is room for everything at once.
    first = min(longest, chunk_size) if session.device == "cpu" else longest
    cache = session.new_cache(len(prompts), bucket_capacity(first, limit), limit)
    next_logits = np.empty((len(prompts), manifest.vocab_size), np.float32)
    for chunk in iter_chunks(prompts, chunk_size):
        last = np.maximum(chunk.lengths - 1, 0)[:, None]
        logits = run_chunk(session, cache, chunk, last)
        # A prompt's last chunk comes last, so its logits are the ones that stay.
        present = chunk.lengths > 0
        next_logits[present] = logits[present, 0]
    return cache, next_logits


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One new token of one row.

    Attributes:
        row: Index of the prompt in the batch.
        token_id: The token.
        finish_reason: None while the row goes on.
    """

    row: int
    token_id: int
    finish_reason: FinishReason | None


class _Row:
    """One prompt at work: its tokens so far and how to choose the next."""

    def __init__(
        self, index: int, prompt: Sequence[int], limit: int, params: SamplingParams
    ) -> None:
        self.index = index
        self.length = len(prompt)
        self._limit = limit
        self._tokens = np.empty(limit, np.int64)
        self._tokens[: self.length] = prompt
        self._sampler = Sampler(params)

    def choose(self, logits_V: Logits) -> int:
        token = self._sampler(logits_V, self._tokens[: self.length])
        self._tokens[self.length] = token
        self.length += 1
        return token

    @property
    def last_token(self) -> int:
        return int(self._tokens[self.length - 1])

    @property
    def is_full(self) -> bool:
        return self.length == self._limit


class BatchDecoder:
    """Generates tokens for prompts of different lengths, one step at a time.

    Every row has its own sampler and its own length, so it yields what it would alone. A
    finished row leaves the batch, and the others go on without its work.

    Args:
        session: The bundle's session.
        prompts: Tokens of each prompt.
        params: How to choose tokens and when to stop; stop strings are left to the text layer.
        chunk_size: Most prompt tokens to run at once.

    Raises:
        PromptError: A prompt is empty or has tokens outside the vocabulary, or there is none.
        ContextOverflowError: A prompt leaves no room for a new token.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        chunk_size: int = PREFILL_CHUNK,
    ) -> None:
        manifest = session.manifest
        check_token_ids(prompts, manifest.vocab_size)
        _check_room(prompts, manifest.context_length)
        self._session = session
        self._prompts = prompts
        self._chunk_size = chunk_size
        end_tokens = () if params.ignore_eos else manifest.eos_token_ids
        self._end_tokens = frozenset((*end_tokens, *params.stop_token_ids))
        limits = [
            min(len(prompt) + params.max_new_tokens, manifest.context_length) for prompt in prompts
        ]
        self._rows = [
            _Row(index, prompt, limit, params)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        self._limit = max(limits)
        self._cache: KVCache | None = None
        self._leaving: set[int] = set()

    def drop(self, row: int) -> None:
        """End a row before its time, for a reason that tokens do not show."""
        self._leaving.add(row)

    def step(self) -> list[TokenStep]:
        """Generate the next token of every row at work; none at all when all have finished."""
        if self._cache is None:
            self._cache, logits = prefill(
                self._session, self._prompts, self._limit, self._chunk_size
            )
        else:
            self._remove_leaving(self._cache)
            if not self._rows:
                return []
            logits = self._decode(self._cache)
        steps = []
        for row, logits_V in zip(self._rows, logits, strict=True):
            token = row.choose(logits_V)
            reason: FinishReason | None = None
            if token in self._end_tokens:
                reason = "stop"
            elif row.is_full:
                reason = "length"
            if reason is not None:
                self._leaving.add(row.index)
            steps.append(TokenStep(row.index, token, reason))
        return steps

    def _decode(self, cache: KVCache) -> Logits:
        token_ids = np.array([[row.last_token] for row in self._rows], np.int64)
        # The last token is the one to run: it has no place in the cache yet.
        past_lengths = np.array([row.length - 1 for row in self._rows], np.int64)
        valid = int(past_lengths.max())
        cache.reserve(valid + 1, valid)
        logits = self._session.run(cache, token_ids, past_lengths, np.zeros_like(token_ids))
        return logits[:, 0]

    def _remove_leaving(self, cache: KVCache) -> None:
        if not self._leaving:
            return
        staying = [place for place, row in enumerate(self._rows) if row.index not in self._leaving]
        self._rows = [self._rows[place] for place in staying]
        self._leaving.clear()
        if self._rows:
            cache.select(staying, max(row.length for row in self._rows) - 1)


def check_token_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Check that every prompt has tokens, all of them in the vocabulary.

    Raises:
        PromptError: They are not, or there is no prompt.
    """
    if len(prompts) == 0:
        raise PromptError("there are no prompts; give at least one")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise PromptError(f"prompt {index} has no tokens; give at least one")
        least, most = min(prompt), max(prompt)
        if least < 0 or most >= vocab_size:
            raise PromptError(
                f"prompt {index} has token {least if least < 0 else most}, outside the vocabulary "
                f"of {vocab_size}; use the tokenizer of this checkpoint"
            )


def _check_room(prompts: Sequence[Sequence[int]], context_length: int) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) >= context_length:
            raise ContextOverflowError(
                f"prompt {index} has {len(prompt)} tokens and the context holds {context_length} "
                "with at least one new token; shorten the prompt"
            )


class _TextRow:
    """Collects one row's tokens into text pieces and, at the end, a result."""

    def __init__(
        self, tokenizer: TextTokenizer, prompt: Sequence[int], params: SamplingParams, start: float
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._matcher = StopMatcher(params.stop)
        self._prompt_tokens = len(prompt)
        self._start = self._first = start
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._given_tokens = 0

    def add(self, step: TokenStep) -> TextPiece | None:
        """Take a step; returns a piece if there is text to show or the row has finished."""
        now = time.perf_counter()
        if not self._token_ids:
            self._first = now
        self._token_ids.append(step.token_id)
        # An end token is no text, even one that the tokenizer does not call special.
        text = "" if step.finish_reason == "stop" else self._detokenizer.add(step.token_id)
        if step.finish_reason is not None:
            text += self._detokenizer.finish()
        text = self._matcher.add(text)
        reason = step.finish_reason
        if self._matcher.found:
            reason = "stop"
        elif reason is not None:
            text += self._matcher.finish()
        if not text and reason is None:
            return None
        return self._piece(text, reason, now)

    def _piece(self, text: str, reason: FinishReason | None, now: float) -> TextPiece:
        self._pieces.append(text)
        token_ids = tuple(self._token_ids[self._given_tokens :])
        self._given_tokens = len(self._token_ids)
        result = None if reason is None else self._result(reason, now)
        return TextPiece(text=text, token_ids=token_ids, finish_reason=reason, result=result)

    def _result(self, reason: FinishReason, now: float) -> GenerationResult:
        decode_seconds = now - self._first
        decoded = len(self._token_ids) - 1
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(self._token_ids),
            timings=Timings(
                time_to_first_token=self._first - self._start,
                decode_seconds=decode_seconds,
                decode_tokens_per_second=decoded / decode_seconds if decoded else 0.0,
            ),
        )


def stream_batch(
    session: Session,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    chunk_size: int = PREFILL_CHUNK,
) -> Iterator[tuple[int, TextPiece]]:
    """Generate text for a batch; yields (prompt index, piece) as pieces become certain.

    Args:
        session: The bundle's session.
        tokenizer: The checkpoint's tokenizer.
        prompts: Tokens of each prompt.
        params: How to choose tokens and when to stop.
        chunk_size: Most prompt tokens to run at once.

    Raises:
        PromptError: As `BatchDecoder`.
        ContextOverflowError: As `BatchDecoder`.
    """
    start = time.perf_counter()
    decoder = BatchDecoder(session, prompts, params, chunk_size)
    rows = [_TextRow(tokenizer, prompt, params, start) for prompt in prompts]
    # Not a generator itself, so that a bad prompt is an error at the call and not at the first use.
    return _pieces(decoder, rows)


def _pieces(decoder: BatchDecoder, rows: Sequence[_TextRow]) -> Iterator[tuple[int, TextPiece]]:
    while steps := decoder.step():
        for step in steps:
            piece = rows[step.row].add(step)
            if piece is None:
                continue
            if piece.finish_reason is not None:
                decoder.drop(step.row)
            yield step.row, piece
