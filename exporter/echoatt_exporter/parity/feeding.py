"""Feeds a case to a bundle, call by call, and hands out the rows that were kept.

Shapes: B batch, S new tokens, n wanted rows, V vocabulary, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from echoatt_exporter.parity.cases import AnyCase, BatchCase, BatchRow, Case
from echoatt_exporter.parity.instrumented import context_name
from echoatt_exporter.parity.reference import ReferenceText
from echoatt_exporter.parity.yardstick import Floats
from echoatt_runtime import SamplingParams, TextPiece
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor import Executor, Logits
from echoatt_runtime.generation import Batch, TokenSequence

Texts = Sequence[ReferenceText] | Mapping[int, ReferenceText]

_PAD_SEED = 7


@dataclass(frozen=True, eq=False)
class BundleRow:
    """What the bundle computed at one position that the reference kept.

    Attributes:
        text: The text's index.
        kept: The index among the text's kept positions.
        logits: Float32 [V].
        contexts: By layer float32 [H·D]; empty unless asked for, and where a row joins a batch.
    """

    text: int
    kept: int
    logits: Floats
    contexts: tuple[Floats, ...]


def feed(
    executor: Executor, case: AnyCase, texts: Texts, *, contexts: bool = False
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
    if isinstance(case, BatchCase):
        yield from _feed_batch(executor, case, texts, contexts=contexts)
    else:
        yield from _feed_steps(executor, case, texts, contexts=contexts)


def _feed_steps(
    executor: Executor, case: Case, texts: Texts, *, contexts: bool
) -> Iterator[BundleRow]:
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


class _TextSequence(TokenSequence):
    """A sequence that goes on with its text's own tokens, whatever the bundle would choose.

    Attributes:
        text: The text's index.
        logits: Float32 [V], those after the newest token but one.
    """

    def __init__(self, row: BatchRow, text: ReferenceText, specification: Specification) -> None:
        # Not greedy: otherwise a batch asks for tokens and not for logits
        params = SamplingParams(
            temperature=1, max_new_tokens=row.stop - row.prompt, ignore_eos=True
        )
        super().__init__(text.tokens[: row.prompt].tolist(), params, specification, None)
        self.text = row.text
        self.logits: Floats | None = None
        self._text_tokens = text.tokens

    def take_logits(self, logits_V: Logits) -> TextPiece | None:
        """Keep the logits, and take the text's next token."""
        self.logits = logits_V
        return self.take_choice(int(self._text_tokens[self.length]), finite=True)


def _feed_batch(
    executor: Executor, case: BatchCase, texts: Texts, *, contexts: bool
) -> Iterator[BundleRow]:
    specification = executor.specification
    batch = Batch(executor, case.slots, case.chunk)
    waiting = list(case.rows)
    steps = 0
    while waiting or batch.rows:
        new = [row for row in waiting if row.after == steps]
        waiting = [row for row in waiting if row.after > steps]
        if new:
            joining = [_TextSequence(row, texts[row.text], specification) for row in new]
            batch.join(joining)
            for sequence in joining:
                yield from _newest(sequence, texts, [], 0)
        working = [row for row in batch.rows if isinstance(row, _TextSequence)]
        batch.step()
        steps += 1
        contexts_BSC = _contexts(executor) if contexts and working else []
        for row, sequence in enumerate(working):
            yield from _newest(sequence, texts, contexts_BSC, row)


def _newest(
    sequence: _TextSequence,
    texts: Texts,
    contexts_BSC: Sequence[npt.NDArray[np.float32]],
    row: int,
) -> Iterator[BundleRow]:
    """The row of a sequence's last logits, if the reference kept its position."""
    (found,) = np.nonzero(texts[sequence.text].positions == sequence.length - 2)
    if sequence.logits is not None:
        for index in found:
            contexts = tuple(layer_BSC[row, -1] for layer_BSC in contexts_BSC)
            yield BundleRow(sequence.text, int(index), sequence.logits, contexts)


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
