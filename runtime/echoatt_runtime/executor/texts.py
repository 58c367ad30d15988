"""The one way in which texts are run in chunks, whatever is wanted of them.

Shapes: n wanted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from echoatt_runtime.cache import KVCache
from echoatt_runtime.executor.executor import Executor
from echoatt_runtime.executor.step_arrays import Logits

# Probabilities take chunk x capacity: small chunks save memory, large ones feed the cores.
PREFILL_CHUNK: Final = 256


@dataclass(frozen=True, slots=True)
class TextLogits:
    """What one chunk gave of one text.

    Attributes:
        text: Index of the text.
        positions: The wanted positions in the chunk, ascending; often none.
        logits: Of the tokens after them, [n, V].
    """

    text: int
    positions: range
    logits: Logits


def run_texts(
    executor: Executor,
    cache: KVCache,
    texts: Sequence[Sequence[int]],
    firsts: Sequence[int],
    chunk_size: int = PREFILL_CHUNK,
    lengths_before: Sequence[int] = (),
) -> Iterator[list[TextLogits]]:
    """Run whole texts, each in a slot of its own, in chunks.

    A text that has ended is not run again while others go on: the slots are given to the longest
    first, so that those at work are one run of slots.

    Args:
        executor: What runs them.
        cache: Its cache, with a slot for each text behind those that are taken; it grows as needed.
        texts: Tokens of each text, of any lengths but 0.
        firsts: Of each text, the first position whose logits are wanted; so are all after it.
        chunk_size: Most tokens of a text to run at once.
        lengths_before: Tokens in each slot that is taken already.

    Yields:
        For each chunk, what it gave of every text in `texts`, in their order.

    Raises:
        EchoAttError: As `Executor.run` and `KVCache.reserve`.
    """
    order = slots_of(texts)
    lengths = np.array([len(texts[text]) for text in order], np.int64)
    for start in range(0, int(lengths[0]), chunk_size):
        stop = min(start + chunk_size, int(lengths[0]))
        rows = int(np.count_nonzero(lengths > start))
        columns = stop - start
        if columns == 1 < chunk_size and stop < cache.limit:
            # A graph attends in another way for a single token, which rounds otherwise: what a text
            # gets must not depend on whether a longer one is beside it
            columns = 2
        token_ids = np.zeros((rows, columns), np.int64)
        wanted: list[range] = []
        for row in range(rows):
            tokens = texts[order[row]][start:stop]
            token_ids[row, : len(tokens)] = tokens
            wanted.append(range(max(firsts[order[row]], start), start + len(tokens)))
        indices = np.zeros((rows, max(1, *map(len, wanted))), np.int64)
        for row, positions in enumerate(wanted):
            indices[row, : len(positions)] = np.arange(positions.start, positions.stop) - start
        held = [*lengths_before, *np.minimum(lengths, start).tolist()]
        cache.reserve(max(start + columns, *lengths_before, 0), held)
        logits_BnV = executor.run(
            cache, token_ids, np.full(rows, start, np.int64), indices, len(lengths_before)
        )
        found = [TextLogits(text, range(0), logits_BnV[0, :0]) for text in range(len(texts))]
        for row, positions in enumerate(wanted):
            text = order[row]
            found[text] = TextLogits(text, positions, logits_BnV[row, : len(positions)])
        yield found


def slots_of(texts: Sequence[Sequence[int]]) -> list[int]:
    """The texts in the order in which `run_texts` gives them slots: the longest first."""
    return sorted(range(len(texts)), key=lambda text: -len(texts[text]))
