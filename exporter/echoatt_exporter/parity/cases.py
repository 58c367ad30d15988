"""What is compared: texts, and the ways in which a bundle is fed with them. Pure data.

The sizes are small on purpose: they exercise every way of feeding a graph (whole, in pieces, token
by token, in rows of different lengths that come and go, across a growth of the caches and the end
of a window), and a model of a billion parameters still goes through all of them within a minute or
so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoatt_runtime.cache import bucket_capacity
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor import Integers
from echoatt_runtime.text import TOKENIZER_FILE, TextTokenizer

_SEED = 20240914
_PREFILL_TOKENS = 27
_CHUNK = 13
_SINGLE_STEPS = 5
_DECODED_TOKENS = 6
_RAGGED_BEGIN = 5
_RAGGED_DECODE = 2
# Does not divide a bucket, so that a chunk begins in one bucket of the caches and ends in the next
_LONG_CHUNK = 192
_LONG_POSITIONS = 16
# How far behind the place where something changes single tokens are run, and how many
_BEHIND = 8
_SINGLES = 4
_LAST_SINGLES = 2
# What of the window's end an export sees: single tokens and a chunk behind them
_PAST_WINDOW = 40
# An export goes past a window when the text for it is not longer than this
_LONGEST_VERIFIED = 1_100
_SHORTEST_VERIFIED = 300
# Of different lengths, so that rows of a batch are
_PROMPT_TOKENS = (26, 19, 36)
_SHORTEST_PROMPT = 12

_PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n\nmean([",
    "Die Würde des Menschen ist unantastbar. 人人生而自由, 在尊严和权利上一律平等。 🙂 1,024 * 3 =",
)


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A text that PyTorch shall run.

    Attributes:
        tokens: Int64 [S].
        positions: The positions whose logits are kept, ascending.
    """

    tokens: Integers
    positions: Integers


@dataclass(frozen=True, slots=True)
class Case:
    """A way of feeding texts to a bundle.

    Attributes:
        name: For the report.
        texts: By row of the batch, which text it runs.
        steps: By call, how many tokens of its text each row gets. Rows that get fewer than the
            longest one are padded on the right.
    """

    name: str
    texts: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row that joins a batch, goes on by single tokens, and leaves.

    Attributes:
        text: Which text it runs.
        prompt: Tokens of it that are run when it joins.
        stop: Tokens of it that it has when it leaves; the last of them is not run.
        after: How many steps the batch has taken when it joins.
    """

    text: int
    prompt: int
    stop: int
    after: int


@dataclass(frozen=True, slots=True)
class BatchCase:
    """Texts that are run as sequences are generated, in a batch whose rows join and leave.

    Attributes:
        name: For the report.
        rows: By the step after which they join.
        slots: Rows that the batch has room for.
        chunk: Most tokens of a prompt to run at once.
    """

    name: str
    rows: tuple[BatchRow, ...]
    slots: int
    chunk: int

    @property
    def texts(self) -> tuple[int, ...]:
        """The texts that it runs, each once."""
        return tuple(dict.fromkeys(row.text for row in self.rows))


AnyCase = Case | BatchCase


@dataclass(frozen=True, eq=False)
class Script:
    """Everything that is compared.

    Attributes:
        texts: What PyTorch runs.
        cases: What the bundle runs, and is judged by.
        prompts: All texts but the long one in one batch: what quantisation costs is told of them.
    """

    texts: tuple[TextRequest, ...]
    cases: tuple[AnyCase, ...]
    prompts: Case


def verified_context(specification: Specification) -> int:
    """The tokens of the long text that an export can afford, for `max_context`.

    They go past a growth of the caches, and past the window where that is not far; `echoatt parity`
    goes up to the model's own limit.

    Args:
        specification: The bundle's.
    """
    past = (specification.sliding_window or 0) + _PAST_WINDOW
    return max(_SHORTEST_VERIFIED, past) if past <= _LONGEST_VERIFIED else _SHORTEST_VERIFIED


def write_script(
    specification: Specification, tokenizer_dir: Path | None, max_context: int | None = None
) -> Script:
    """Choose texts and cases for a model.

    Args:
        specification: The bundle's.
        tokenizer_dir: Where real prompts get their tokens; without a `tokenizer.json` there, the
            tokens of every text are random (and always the same).
        max_context: The most tokens of the long text; None is the model's context length.

    Raises:
        BundleError: The tokenizer's files are damaged.
    """
    limit = specification.context_length
    if max_context is not None:
        limit = min(limit, max_context)
    random = np.random.default_rng(_SEED)
    window = specification.sliding_window
    grown = bucket_capacity(1, specification.context_length)
    edges = [grown] if window is None else [grown, window]

    # Every case runs the beginnings of the same few texts, so that PyTorch has few tokens to run
    prefill = min(_PREFILL_TOKENS, limit)
    whole = random.integers(0, specification.vocab_size, limit, dtype=np.int64)
    positions = np.arange(limit) if limit == prefill else _long_positions(limit, edges, prefill)
    texts = [TextRequest(whole, positions)]
    for prompt in _prompts(tokenizer_dir, specification.vocab_size, random):
        cut = prompt[:limit]
        texts.append(TextRequest(cut, np.arange(len(cut))))
    lengths = [len(text.tokens) for text in texts]

    decoded = min(_DECODED_TOKENS, lengths[1] // 2)
    cases: list[AnyCase] = [
        Case("prefill", (0,), ((prefill,),)),
        Case("prefill by 1", (0,), ((1,),) * min(_SINGLE_STEPS, prefill)),
        Case(f"prefill by {_CHUNK}", (0,), _chunks(prefill, _CHUNK)),
        Case(f"decode of {decoded}", (1,), ((lengths[1] - decoded,), *((1,),) * decoded)),
        _ragged([min(limit, _RAGGED_BEGIN + _RAGGED_DECODE), *lengths[2:]]),
    ]
    if limit > prefill:
        chunk = _LONG_CHUNK if limit > _LONG_CHUNK else limit // 3 + 1
        inside = window is not None and limit <= window
        remark = f", inside the window of {window}" if inside else ""
        name = f"context of {limit} by {chunk} and 1{remark}"
        cases.append(Case(name, (0,), _long_steps(limit, chunk, edges)))
    cases.append(_joining(lengths, grown))
    prompts = Case("prompts", tuple(range(1, len(texts))), (tuple(lengths[1:]),))
    return Script(tuple(texts), tuple(cases), prompts)


def _chunks(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple((min(size, count - start),) for start in range(0, count, size))


def _singles(count: int, edges: Sequence[int]) -> list[int]:
    """The positions of a long text that are run alone: behind each edge, and at the end."""
    behind = [edge + _BEHIND + number for edge in edges for number in range(_SINGLES)]
    last = range(count - _LAST_SINGLES, count)
    return sorted({position for position in (*behind, *last) if 0 <= position < count})


def _long_steps(count: int, size: int, edges: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Chunks that go over each edge, and single tokens behind it, which are not the last."""
    singles = _singles(count, edges)
    steps: list[tuple[int]] = []
    start = 0
    while start < count:
        stop = next((single for single in singles if single >= start), count)
        step = 1 if stop == start else min(size, stop - start)
        steps.append((step,))
        start += step
    return tuple(steps)


def _ragged(lengths: Sequence[int]) -> Case:
    """A prefill, a second chunk, decoding and a batch in one.

    Args:
        lengths: How many tokens of the first text, the third and those behind it are run.
    """
    body = [max(1, length - _RAGGED_DECODE) for length in lengths]
    half = tuple((count + 1) // 2 for count in body)
    rest = tuple(count - done for count, done in zip(body, half, strict=True))
    singles = ((1,) * len(lengths),) * _RAGGED_DECODE
    texts = (0, *range(2, len(lengths) + 1))
    return Case("ragged batch", texts, (half, rest, *singles))


def _joining(lengths: Sequence[int], grown: int) -> BatchCase:
    """A long row that outgrows the first caches by single tokens, and short ones beside it.

    One of them leaves before the long one and one after it, whose place it takes in caches that
    become small again. Then another row joins.
    """
    stop = min(lengths[0], grown + _SINGLES + 2)
    rows = [BatchRow(0, max(1, min(grown, stop) - 2), stop, 0)]
    for text, count, after in ((2, 4, 1), (3, 10, 1), (2, 6, _SINGLES + 4)):
        prompt = lengths[text] // 2
        rows.append(BatchRow(text, prompt, min(lengths[text], prompt + count), after))
    return BatchCase("rows that join and leave", tuple(rows), slots=3, chunk=_LONG_CHUNK)


def _long_positions(count: int, edges: Sequence[int], prefill: int) -> Integers:
    """Those of other cases, those run alone, those at which something changes, and a spread."""
    singles = _singles(count, edges)
    changes = [_LONG_CHUNK, count - 1, *edges]
    changes += [2 * edge for edge in edges[1:]]
    near = [edge + offset for edge, offset in itertools.product(changes, (-1, 0, 1))]
    joined = range(edges[0] - 3, edges[0] + _SINGLES + 2)
    spread = np.linspace(0, count - 1, _LONG_POSITIONS).astype(np.int64).tolist()
    # And the first ones of the chunks behind single tokens
    behind = [single + 1 for single in singles]
    wanted = (*range(prefill), *near, *joined, *singles, *behind, *spread)
    kept = sorted({position for position in wanted if 0 <= position < count})
    return np.array(kept, np.int64)


def _prompts(
    directory: Path | None, vocab_size: int, random: np.random.Generator
) -> list[Integers]:
    """Short texts: real ones where there is a tokenizer for them."""
    tokenizer: TextTokenizer | None = None
    if directory is not None and (directory / TOKENIZER_FILE).is_file():
        tokenizer = TextTokenizer.from_directory(directory)
    prompts = []
    for text, count in zip(_PROMPTS, _PROMPT_TOKENS, strict=True):
        tokens = [] if tokenizer is None else tokenizer.encode(text)
        # Some tokenizers know more tokens than their model
        known = np.array([token for token in tokens if token < vocab_size][:count], np.int64)
        if len(known) < _SHORTEST_PROMPT:
            known = random.integers(0, vocab_size, count, dtype=np.int64)
        prompts.append(known)
    return prompts
