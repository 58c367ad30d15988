"""Sequences that are generated together: they join, take steps, and leave.

Which of them join and when is somebody else's to say. Rows at work take the first slots of one
cache, so that a step is one call of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from echoatt_runtime.cache import KVCache
from echoatt_runtime.executor import (
    PREFILL_CHUNK,
    Executor,
    Logits,
    TopLogits,
    run_texts,
    slots_of,
)
from echoatt_runtime.generation.sequence import TokenSequence
from echoatt_runtime.results import TextPiece

Pieces = list[tuple[TokenSequence, TextPiece]]


class Batch:
    """Rows of one cache.

    Attributes:
        rows: The sequences at work, by slot.
        cache: Their keys and values; None before the first sequence.
    """

    def __init__(self, executor: Executor, slots: int, prefill_chunk: int = PREFILL_CHUNK) -> None:
        """Make room for sequences.

        Args:
            executor: What runs them.
            slots: Most sequences at work at once.
            prefill_chunk: Most tokens of a prompt to run at once.
        """
        self.rows: list[TokenSequence] = []
        self.cache: KVCache | None = None
        self._executor = executor
        self._slots = slots
        self._prefill_chunk = prefill_chunk

    @classmethod
    def resume(
        cls,
        executor: Executor,
        cache: KVCache,
        sequences: Sequence[TokenSequence],
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Batch:
        """A batch of sequences whose tokens a cache holds already, all but the last.

        Args:
            executor: What runs them.
            cache: With a sequence's tokens in each of its first slots.
            sequences: By slot.
            prefill_chunk: As in `Batch`.
        """
        batch = cls(executor, cache.slots, prefill_chunk)
        batch.cache, batch.rows = cache, list(sequences)
        return batch

    def join(self, sequences: Sequence[TokenSequence]) -> Pieces:
        """Run new sequences' prompts, choose their first tokens, and take them in.

        Rows at work are left alone, but that their memory grows where a new one needs more.

        Args:
            sequences: No more than there are slots left, each with a prompt only.

        Returns:
            What there is to show of them.

        Raises:
            EchoAttError: As `Executor.run`; the rows at work stay as they were.
        """
        prompts = [sequence.token_ids.tolist() for sequence in sequences]
        limit = max(sequence.limit for sequence in (*self.rows, *sequences))
        if self.cache is None:
            # Attention pays for the whole buffer and growing is cheap, so it starts small
            first = min(max(map(len, prompts)), self._prefill_chunk)
            self.cache = self._executor.new_cache(self._slots, first, limit)
        self.cache.limit = limit
        last: dict[int, Logits] = {}
        chunks = run_texts(
            self._executor,
            self.cache,
            prompts,
            [len(prompt) - 1 for prompt in prompts],
            self._prefill_chunk,
            self._lengths(),
        )
        for chunk in chunks:
            last |= {found.text: found.logits[0] for found in chunk if found.positions}
        pieces = [(sequence, sequence.take_logits(last[i])) for i, sequence in enumerate(sequences)]
        self.rows += [sequences[text] for text in slots_of(prompts)]
        self._let_go()
        return [(sequence, piece) for sequence, piece in pieces if piece is not None]

    def step(self) -> Pieces:
        """Choose the next token of every row; those that finish leave.

        Returns:
            What there is to show of them.

        Raises:
            EchoAttError: As `Executor.run`.
        """
        if not self.rows or self.cache is None:
            return []
        lengths = self._lengths()
        self.cache.reserve(max(lengths) + 1, lengths)
        token_ids = np.array([[row.last_token] for row in self.rows], np.int64)
        # The last token is the one to run: it has no place in the cache yet.
        past_lengths = np.array(lengths, np.int64)
        free = self.cache.slots - len(self.rows)
        arguments = self.cache, token_ids, past_lengths, np.zeros_like(token_ids), 0, free
        if all(row.params.is_greedy for row in self.rows):
            choice = self._executor.choose(*arguments)
            taken = zip(choice.token_ids.tolist(), choice.finite.tolist(), strict=True)
            pieces = [row.take_choice(*one) for row, one in zip(self.rows, taken, strict=True)]
        elif (top := self._top(*arguments)) is not None:
            taken_of = zip(self.rows, top.token_ids, top.logits, strict=True)
            pieces = [row.take_top(tokens, logits) for row, tokens, logits in taken_of]
        else:
            logits_BV = self._executor.run(*arguments)[:, 0]
            pieces = [
                row.take_logits(logits_V)
                for row, logits_V in zip(self.rows, logits_BV, strict=True)
            ]
        shown = [
            (row, piece) for row, piece in zip(self.rows, pieces, strict=True) if piece is not None
        ]
        self._let_go()
        return shown

    def _top(self, *arguments: Any) -> TopLogits | None:
        """Of each row enough of the most probable tokens; None where they are not what to take."""
        enough = [row.params.enough for row in self.rows]
        if not 0 < min(enough) <= max(enough) <= self._executor.most_top:
            return None
        return self._executor.top(*arguments, number=max(enough))

    def leave(self, sequence: TokenSequence) -> None:
        """Let a row go before it has finished."""
        self._let_go(sequence)

    def _lengths(self) -> list[int]:
        """Tokens of each row that the cache holds."""
        return [row.length - 1 for row in self.rows]

    def _let_go(self, leaving: TokenSequence | None = None) -> None:
        """Let finished rows go; the last row takes the place of one that goes, none else moves."""
        gone = [s for s, row in enumerate(self.rows) if row.finished or row is leaving]
        if not gone or self.cache is None:
            return
        for slot in reversed(gone):
            result = self.rows[slot].result
            if result is not None and result.error is not None:
                self.cache.clear(slot)
            last = self.rows.pop()
            if slot < len(self.rows):
                self.cache.move(len(self.rows), slot, last.length - 1)
                self.rows[slot] = last
        if self.rows:
            self.cache.limit = max(row.limit for row in self.rows)
            lengths = self._lengths()
            self.cache.shrink(max(lengths) + 1, lengths)


def generate(
    executor: Executor,
    sequences: Sequence[TokenSequence],
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[tuple[TokenSequence, TextPiece]]:
    """Generate for sequences that begin together; yields pieces as they become certain.

    Raises:
        EchoAttError: As `Executor.run`, while iterating.
    """
    batch = Batch(executor, len(sequences), prefill_chunk)
    yield from batch.join(sequences)
    while batch.rows:
        yield from batch.step()
