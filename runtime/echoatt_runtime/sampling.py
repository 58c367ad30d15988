"""Sampling: pure functions over one row of logits, and the parameters that order them.

The functions mean what transformers' logits processors of the same names mean, and `Sampler`
applies them in the same order: repetition penalty, temperature, top-k, top-p, min-p, draw. None of
them sorts the vocabulary where a partition will do, because that costs more than a small model.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from echoatt_runtime.errors import NumericalError, SamplingError
from echoatt_runtime.plain_values import as_float, as_integer, as_list
from echoatt_runtime.text import unicode_fault

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]

# Top-p sorts the tokens this close to the most probable one, in logits; the first margin nearly
# always holds the mass asked for.
_NUCLEUS_MARGINS: Final = (5.0, 10.0, math.inf)

# Beyond them float32 overflows or loses the logits' order. A temperature above the second makes all
# tokens equally probable anyway, one below the first leaves only the most probable.
_LEAST_FACTOR: Final = 1e-30
_LARGEST_FACTOR: Final = 1e30
_LARGEST_LOGIT: Final = float(np.finfo(np.float32).max)

# Whatever a caller has set: what is too far below the most probable token has no probability
_rounding_quietly = np.errstate(over="ignore", under="ignore")

# Draws look for a block first and for a token inside it, instead of summing up the vocabulary.
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    Numbers may be numpy's; they are kept as Python's own.

    The defaults decode greedily: the same prompt gives the same text everywhere, whatever a
    checkpoint's generation_config.json suggests. Set `temperature` above 0 to draw.

    Attributes:
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_k: Keeps the k most probable tokens; 0 keeps all.
        top_p: Keeps the smallest set of most probable tokens whose mass reaches it; 1 keeps all.
        min_p: Keeps tokens at least this fraction as probable as the most probable; 0 keeps all.
        repetition_penalty: Above 1 makes tokens of the prompt and the text so far less likely.
        seed: Seed of the draws; every prompt of a batch starts from it. None draws afresh.
        max_new_tokens: Most tokens to generate for a prompt.
        stop: Strings that end the text; they are not part of it. A single string may be given.
        stop_token_ids: Tokens that end generation, besides the model's own.
        ignore_eos: Goes on after the model's end tokens (for measuring).

    Raises:
        SamplingError: Values out of range; the message lists every fault.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Kept as tuples; what is no sequence is wrapped, so that its check below tells of it.
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            items = as_list(value)
            self._set(name, (value,) if items is None else tuple(items))
        faults = [
            *self._check_number("temperature", "at least 0", lambda x: x >= 0),
            *self._check_integer("top_k", 0),
            *self._check_number("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            *self._check_number("min_p", "from 0 to 1", lambda x: 0 <= x <= 1),
            *self._check_number("repetition_penalty", "above 0", lambda x: x > 0),
            *(self._check_integer("seed", 0) if self.seed is not None else ()),
            *self._check_integer("max_new_tokens", 1),
        ]
        if any(not isinstance(text, str) or not text for text in self.stop):
            faults.append(f"stop is {self.stop!r}, not strings of at least one character")
        elif found := [fault for text in self.stop if (fault := unicode_fault(text))]:
            faults.append(f"stop is {self.stop!a}, no Unicode text ({found[0]})")
        tokens = [as_integer(token, 0) for token in self.stop_token_ids]
        for given, token in zip(self.stop_token_ids, tokens, strict=True):
            if token is None:
                faults.append(f"stop_token_ids is {given!r}, not an integer of at least 0")
        self._set("stop_token_ids", tuple(tokens))
        faults += self._check_truth("ignore_eos")
        if faults:
            raise SamplingError(f"sampling parameters are out of range: {'; '.join(faults)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is the one to take, as the model gives it."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def enough(self) -> int:
        """How many of the most probable tokens it takes to choose among them; 0 stands for all."""
        if self.repetition_penalty != 1:
            return 0
        return 1 if self.temperature == 0 else self.top_k

    def _check_number(
        self, name: str, wanted: str, in_range: Callable[[float], bool]
    ) -> Iterator[str]:
        """Keep a number as a float, or tell what is wrong with it."""
        value = getattr(self, name)
        number = as_float(value)
        if number is None or not in_range(number):
            yield f"{name} is {value!r}, not a number {wanted}"
        self._set(name, number)

    def _check_integer(self, name: str, least: int) -> Iterator[str]:
        """Keep an integer as an int, or tell what is wrong with it."""
        value = getattr(self, name)
        number = as_integer(value, least)
        if number is None:
            yield f"{name} is {value!r}, not an integer of at least {least}"
        self._set(name, number)

    def _check_truth(self, name: str) -> Iterator[str]:
        """Keep a truth value as a bool, or tell what is wrong with it."""
        value = getattr(self, name)
        if isinstance(value, bool | np.bool_):
            self._set(name, bool(value))
        else:
            yield f"{name} is {value!r}, not True or False"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@_rounding_quietly
def apply_repetition_penalty(logits_V: Logits, token_ids: TokenIds, penalty: float) -> Logits:
    """Divide the positive and multiply the negative logits of `token_ids` by `penalty`.

    Args:
        logits_V: Logits of one row.
        token_ids: Tokens of the prompt and the text so far; repeats count once.
        penalty: Above 1 makes them less likely, below 1 more likely.
    """
    penalised_V = logits_V.copy()
    seen = logits_V[token_ids].astype(np.float64)
    factor = min(max(penalty, _LEAST_FACTOR), _LARGEST_FACTOR)
    penalised = np.where(seen < 0, seen * factor, seen / factor)
    # What a filter has removed stays so, and nothing else becomes infinite
    is_there = seen > -np.inf
    penalised_V[token_ids[is_there]] = penalised[is_there].clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    return penalised_V


@_rounding_quietly
def apply_temperature(logits_V: Logits, temperature: float) -> Logits:
    """Divide the logits' distances from the largest by `temperature`, which must be above 0.

    The largest becomes 0, which leaves probabilities as they are. A temperature near 0 then drives
    the others to -inf, and a very large one makes all equally probable without losing their order.
    """
    scaled_V: Logits = logits_V - logits_V.max()
    if temperature < _LEAST_FACTOR:
        return (scaled_V.astype(np.float64) / temperature).astype(np.float32)
    scaled_V /= np.float32(min(temperature, _LARGEST_FACTOR))
    return scaled_V


def keep_top_k(logits_V: Logits, k: int) -> Logits:
    """Set all but the `k` largest logits to -inf; those equal to the k-th stay too."""
    if k >= len(logits_V):
        return logits_V
    threshold = np.partition(logits_V, -k)[-k]
    return _keep(logits_V, np.flatnonzero(logits_V >= threshold))


@_rounding_quietly
def keep_top_p(logits_V: Logits, top_p: float) -> Logits:
    """Set all logits to -inf but the smallest set of largest ones with mass `top_p` or more.

    At least one token stays. Among equally probable tokens those with lower ids come first.
    """
    largest = logits_V.max()
    _, weights = _candidates(logits_V)
    mass = top_p * float(weights.sum(dtype=np.float64))
    for margin in _NUCLEUS_MARGINS:
        ids = np.flatnonzero(logits_V >= largest - np.float32(margin))
        ids = ids[np.argsort(-logits_V[ids], kind="stable")]
        weights = np.exp(logits_V[ids] - largest)
        mass_up_to = np.cumsum(weights, dtype=np.float64)
        if mass_up_to[-1] >= mass:
            break
    return _keep(logits_V, ids[mass_up_to - weights < mass])


def keep_min_p(logits_V: Logits, min_p: float) -> Logits:
    """Set logits to -inf whose probability is below `min_p` times the largest one's."""
    threshold = logits_V.max() + np.float32(math.log(min_p))
    return _keep(logits_V, np.flatnonzero(logits_V >= threshold))


def sample(logits_V: Logits, generator: np.random.Generator) -> int:
    """Draw a token with the probabilities softmax(logits); uses one number of `generator`."""
    ids, weights = _candidates(logits_V)
    block_mass = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    block, drawn = _draw(block_mass, generator.random())
    start = block * _BLOCK
    index, _ = _draw(weights[start : start + _BLOCK].astype(np.float64), drawn)
    return int(ids[start + index])


def _keep(logits_V: Logits, ids: npt.NDArray[np.intp]) -> Logits:
    kept_V = np.full_like(logits_V, -np.inf)
    kept_V[ids] = logits_V[ids]
    return kept_V


@_rounding_quietly
def _candidates(logits_V: Logits) -> tuple[npt.NDArray[np.intp] | range, Logits]:
    """Tokens that may be drawn, with weights proportional to their probabilities."""
    possible = logits_V > -np.inf
    ids: npt.NDArray[np.intp] | range = range(len(logits_V))
    if np.count_nonzero(possible) < len(logits_V) // 2:
        ids = np.flatnonzero(possible)
        logits_V = logits_V[ids]
    weights = logits_V - logits_V.max()
    return ids, np.exp(weights, out=weights)


def _draw(mass: npt.NDArray[np.float64], fraction: float) -> tuple[int, float]:
    """Find where `fraction` of the whole mass is reached, and how far inside that place it is."""
    mass_up_to = np.cumsum(mass)
    target = fraction * mass_up_to[-1]
    # Rounding can lift the target to the whole mass; the last place with any mass is meant then.
    last = np.searchsorted(mass_up_to, mass_up_to[-1])
    index = min(int(np.searchsorted(mass_up_to, target, side="right")), int(last))
    inside = (target - (mass_up_to[index] - mass[index])) / mass[index]
    return index, min(max(float(inside), 0.0), 1.0)


def not_finite(tokens: int) -> NumericalError:
    """What to raise where the logits after so many tokens are not numbers."""
    return NumericalError(
        f"the logits after {tokens} tokens are not finite; "
        "the bundle's dtype overflows: export with a wider --dtype"
    )


class Sampler:
    """Chooses one row's tokens. Rows share nothing: equal logits draw the same in any batch."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = np.random.default_rng(params.seed)

    def __call__(self, logits_V: Logits, token_ids: TokenIds) -> int:
        """Choose the next token.

        Args:
            logits_V: Logits of the next token.
            token_ids: Tokens of the prompt and the text so far.

        Raises:
            NumericalError: The logits are NaN or infinite.
        """
        params = self._params
        # NaN is the largest of all to argmax
        largest = int(logits_V.argmax())
        if not math.isfinite(logits_V[largest]):
            raise not_finite(len(token_ids))
        if params.repetition_penalty != 1:
            logits_V = apply_repetition_penalty(logits_V, token_ids, params.repetition_penalty)
        return self._choose(logits_V)

    def among(self, token_ids: TokenIds, logits: Logits) -> int:
        """Choose the next token among the most probable ones, as it would be among all.

        Args:
            token_ids: Tokens, in any order, `enough` of them and all that are as probable.
            logits: Theirs, all of them numbers.
        """
        order = np.argsort(token_ids)
        return int(token_ids[order][self._choose(logits[order])])

    def _choose(self, logits_V: Logits) -> int:
        params = self._params
        if params.temperature == 0:
            return int(logits_V.argmax())
        logits_V = apply_temperature(logits_V, params.temperature)
        if params.top_k:
            logits_V = keep_top_k(logits_V, params.top_k)
        if params.top_p < 1:
            logits_V = keep_top_p(logits_V, params.top_p)
        if params.min_p > 0:
            logits_V = keep_min_p(logits_V, params.min_p)
        return sample(logits_V, self._generator)
