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
from echoatt_runtime.cache.kv_cache import KVCache, bucket_capacity
from echoatt_runtime.executor.session import Session
from echoatt_runtime.generate import Chunk, run_chunk

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
    session: Session, case: Case, texts: Texts, *, contexts: bool = False
) -> Iterator[BundleRow]:
    """Run a case.

    Args:
        session: The bundle, opened with `contexts` if they are asked for.
        case: What to run.
        texts: By index, what PyTorch computed.
        contexts: Give every layer's attention output too.

    Yields:
        Every position that the reference kept and the case reaches.
    """
    rows = [texts[index] for index in case.texts]
    random = np.random.default_rng(_PAD_SEED)
    past = np.zeros(len(rows), np.int64)
    cache: KVCache | None = None
    for counts in case.steps:
        length = max(counts)
        # Pads are any tokens: what they write must never be seen
        token_ids = random.integers(
            0, session.manifest.vocab_size, (len(rows), length), dtype=np.int64
        )
        wanted = []
        for row, (text, count) in enumerate(zip(rows, counts, strict=True)):
            token_ids[row, :count] = text.tokens[past[row] : past[row] + count]
            inside = (text.positions >= past[row]) & (text.positions < past[row] + count)
            # In an order of their own: a graph that gives rows as they stand must not pass
            wanted.append(random.permutation(np.flatnonzero(inside)))
        indices = np.zeros((len(rows), max(1, *map(len, wanted))), np.int64)
        for row, kept in enumerate(wanted):
            indices[row, : len(kept)] = rows[row].positions[kept] - past[row]
        if cache is None:
            capacity = bucket_capacity(length, session.manifest.context_length)
            cache = session.new_cache(len(rows), capacity)
        if contexts:
            _bind_contexts(session, cache)
        chunk = Chunk(token_ids, past.copy(), np.array(counts, np.int64))
        logits_BnV = run_chunk(session, cache, chunk, indices)
        contexts_BSC = _read_contexts(session, cache) if contexts else []
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


def _bind_contexts(session: Session, cache: KVCache) -> None:
    """Ask for the extra outputs anew: their size changes from call to call."""
    for layer in range(session.manifest.num_layers):
        cache.binding.bind_output(context_name(layer), "cpu")


def _read_contexts(session: Session, cache: KVCache) -> list[npt.NDArray[np.float32]]:
    """The extra outputs, by layer [B, S, H·D]."""
    manifest = session.manifest
    # Outputs come in the order in which they were first bound: caches, contexts, logits
    first = len(manifest.present_names)
    values = cache.binding.get_outputs()[first : first + manifest.num_layers]
    group = manifest.num_query_heads // manifest.num_kv_heads
    found = []
    for value in values:
        context = value.numpy().astype(np.float32)
        batch, kv_heads, queries, size = context.shape
        heads = context.reshape(batch, kv_heads * group, queries // group, size)
        found.append(heads.transpose(0, 2, 1, 3).reshape(batch, queries // group, -1))
    return found
