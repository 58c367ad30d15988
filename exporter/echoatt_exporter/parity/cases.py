"""What is compared: texts, and the ways in which a bundle is fed with them. Pure data.

The sizes are small on purpose: they exercise every way of feeding a graph (whole, in pieces, token
by token, in rows of different lengths, across a growth of the caches), and a model of a billion
parameters still goes through all of them within a minute or so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echoatt_runtime.cache import BUCKET
from echoatt_runtime.contract import Specification
from echoatt_runtime.executor import Integers
from echoatt_runtime.text import TOKENIZER_FILE, TextTokenizer

_SEED = 20240914
_PREFILL_TOKENS = 40
_CHUNK = 13
_SINGLE_STEPS = 4
_GREEDY_TOKENS = 6
_RAGGED_TOKENS = 36
_RAGGED_DECODE = 2
# Does not divide a bucket, so that a chunk begins in one bucket of the caches and ends in the next
_LONG_CHUNK = 192
_LONG_POSITIONS = 20
_PROMPT_TOKENS = 32

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
        greedy: How many tokens PyTorch appends, each its most likely one.
        positions: The positions whose logits are kept, ascending, appended tokens included.
    """

    tokens: Integers
    greedy: int
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


@dataclass(frozen=True, eq=False)
class Script:
    """Everything that is compared.

    Attributes:
        texts: What PyTorch runs.
        cases: What the bundle runs.
        rounded: The case that a bundle with quantised weights repeats with PyTorch computing from
            the same rounded weights.
    """

    texts: tuple[TextRequest, ...]
    cases: tuple[Case, ...]
    rounded: Case


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
    texts: list[TextRequest] = []
    cases: list[Case] = []

    def tokens(count: int) -> Integers:
        return random.integers(0, specification.vocab_size, count, dtype=np.int64)

    def add(text: Integers, greedy: int = 0, positions: Integers | None = None) -> int:
        kept = np.arange(len(text) + greedy) if positions is None else positions
        texts.append(TextRequest(text, greedy, kept))
        return len(texts) - 1

    prompts = _real_prompts(tokenizer_dir, specification.vocab_size, limit)

    prefill = min(_PREFILL_TOKENS, limit)
    first = add(tokens(prefill))
    cases.append(Case("prefill", (first,), ((prefill,),)))
    cases.append(Case("prefill by 1", (first,), ((1,),) * min(_SINGLE_STEPS, prefill)))
    cases.append(Case(f"prefill by {_CHUNK}", (first,), _chunks(prefill, _CHUNK)))

    greedy = min(_GREEDY_TOKENS, limit // 2)
    begin = (prompts[0] if prompts else tokens(prefill))[: limit - greedy]
    decode = add(begin, greedy)
    cases.append(Case(f"decode of {greedy}", (decode,), ((len(begin),), *((1,),) * greedy)))

    whole = min(_RAGGED_TOKENS, limit)
    lengths = [max(1, (whole - _RAGGED_DECODE) // part) for part in (6, 2, 1)]
    half = [(length + 1) // 2 for length in lengths]
    rows = tuple(add(tokens(length + _RAGGED_DECODE)) for length in lengths)
    rest = [length - done for length, done in zip(lengths, half, strict=True)]
    steps = (tuple(half), tuple(rest), *((1,) * len(rows),) * _RAGGED_DECODE)
    # A prefill, a second chunk, decoding and a batch in one: enough for the repetition, for which
    # PyTorch has to round every weight anew
    ragged = Case("ragged batch", rows, steps)
    cases.append(ragged)

    if limit > prefill:
        long = add(tokens(limit), positions=_long_positions(limit, specification.sliding_window))
        chunk = _LONG_CHUNK if limit > _LONG_CHUNK else limit // 3 + 1
        cases.append(Case(f"context of {limit} by {chunk}", (long,), _chunks(limit, chunk)))

    if prompts:
        rows = tuple(add(prompt) for prompt in prompts)
        cases.append(Case("real prompts", rows, (tuple(len(prompt) for prompt in prompts),)))
    return Script(tuple(texts), tuple(cases), ragged)


def _chunks(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple((min(size, count - start),) for start in range(0, count, size))


def _long_positions(count: int, window: int | None) -> Integers:
    """Evenly spread positions, and those at which something changes: windows, chunks, buckets."""
    edges = [BUCKET, _LONG_CHUNK, count - 1, *([window, 2 * window] if window else [])]
    near = [edge + offset for edge, offset in itertools.product(edges, (-1, 0, 1))]
    spread = np.linspace(0, count - 1, _LONG_POSITIONS).astype(np.int64).tolist()
    kept = sorted({position for position in (*near, *spread) if 0 <= position < count})
    return np.array(kept, np.int64)


def _real_prompts(directory: Path | None, vocab_size: int, limit: int) -> Sequence[Integers]:
    if directory is None or not (directory / TOKENIZER_FILE).is_file():
        return []
    tokenizer = TextTokenizer.from_directory(directory)
    prompts = []
    for text in _PROMPTS:
        # Some tokenizers know more tokens than their model
        known = [token for token in tokenizer.encode(text) if token < vocab_size]
        if known:
            prompts.append(np.array(known[: min(_PROMPT_TOKENS, limit)], np.int64))
    return prompts
