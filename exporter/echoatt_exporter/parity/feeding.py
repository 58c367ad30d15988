"""Feeds a case to a bundle, call by call, and hands out the rows that were asked for.

Shapes: B batch, S new tokens, n wanted rows, V vocabulary, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoatt_exporter.parity.cases import Case
from echoatt_exporter.parity.instrumented import context_name
from echoatt_exporter.parity.reference import Floats, ReferenceText
from echoatt_runtime.executor import Executor

Texts = Sequence[ReferenceText] | Mapping[int, ReferenceText]

_PAD_SEED = 7


@dataclass(frozen=True, eq=False)
class BundleRow:
    """What the bundle computed at one position that the reference kept.

    Attributes:
        text: The text's index.
        kept: The index among the text's kept positions.
        logits: Float32 [V].
        contexts: By layer float32 [H·D]; empty unless asked for.
    """

    text: int
    kept: int
    logits: Floats
    contexts: tuple[Floats, ...]


def feed(
    executor: Executor, case: Case, texts: Texts, *, contexts: bool = False
) -> Iterator[BundleRow]:
    """Run a case.

    Args:
        executor: The bundle, opened with `contexts` if they are asked for.
        case: What to run.
        texts: By index, what PyTorch computed.
        contexts: Give every layer's attention output too.

    Yields:
        Every position that the reference kept and the case reaches.
    """
    rows = [texts[index] for index in case.texts]
    random = np.random.default_rng(_PAD_SEED)
    past = np.zeros(len(rows), np.int64)
    specification = executor.specification
    cache = executor.new_cache(len(rows), max(case.steps[0]))
    for counts in case.steps:
        length = max(counts)
        # Pads are any tokens: what they write must never be seen
        token_ids = random.integers(0, specification.vocab_size, (len(rows), length))
        wanted = []
        for row, (text, count) in enumerate(zip(rows, counts, strict=True)):
            token_ids[row, :count] = text.tokens[past[row] : past[row] + count]
            inside = (text.positions >= past[row]) & (text.positions < past[row] + count)
            # In an order of their own: a graph that gives rows as they stand must not pass
            wanted.append(random.permutation(np.flatnonzero(inside)))
        indices = np.zeros((len(rows), max(1, *map(len, wanted))), np.int64)
        for row, kept in enumerate(wanted):
            indices[row, : len(kept)] = rows[row].positions[kept] - past[row]
        cache.reserve(int(past.max()) + length, past.tolist())
        logits_BnV = executor.run(cache, token_ids, past, indices)
        contexts_BSC = _contexts(executor) if contexts else []
        for row, kept in enumerate(wanted):
            for number, index in enumerate(kept):
                at = indices[row, number]
                yield BundleRow(
                    case.texts[row],
                    int(index),
                    logits_BnV[row, number],
                    tuple(layer_BSC[row, at] for layer_BSC in contexts_BSC),
                )
        past += counts


def _contexts(executor: Executor) -> list[npt.NDArray[np.float32]]:
    """The extra outputs, by layer [B, S, H·D]."""
    specification = executor.specification
    found = []
    for layer in range(specification.num_layers):
        context = executor.extra[context_name(layer)].astype(np.float32)
        batch, kv_heads, queries, size = context.shape
        group = specification.query_heads[layer] // kv_heads
        heads = context.reshape(batch, kv_heads * group, queries // group, size)
        found.append(heads.transpose(0, 2, 1, 3).reshape(batch, queries // group, -1))
    return found
