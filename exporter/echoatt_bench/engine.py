"""What every engine offers, whatever it is built on.

Shapes: B batch, T tokens that there is room for, n new tokens.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is asked to load.

    Attributes:
        path: The model: a file or a directory, as the engine has it.
        threads: CPU threads that one operator may use.
        batch: Rows.
        capacity: Tokens that each row needs room for.
        vocab_size: Tokens are drawn from below this.
        seed: Of the tokens.
    """

    path: str
    threads: int
    batch: int
    capacity: int
    vocab_size: int
    seed: int

    def draw_tokens(self) -> Tokens:
        """Random tokens, [B, T]: the same for every engine, however many rows and room it has."""
        rows = [
            np.random.default_rng((self.seed, row)).integers(0, self.vocab_size, self.capacity)
            for row in range(self.batch)
        ]
        return np.stack(rows)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt, or a batch of them, from nothing to the first new token.

    Attributes:
        seconds: Time to the first token.
        first_tokens: The token chosen in each row.
    """

    seconds: float
    first_tokens: list[int]


@dataclass(frozen=True, slots=True)
class Decode:
    """Greedy steps, one token a row each.

    Attributes:
        step_seconds: Of each step, n of them.
        tokens: What the first row chose, n of them.
        extra: What only this engine can tell, by name; seconds a step.
    """

    step_seconds: list[float]
    tokens: list[int]
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded model. It is made with a `Load`, and what that takes is the time to load.

    Attributes:
        PACKAGES: What is imported before that.
    """

    PACKAGES: ClassVar[tuple[str, ...]]

    def __init__(self, load: Load) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What the engine says of itself: `version` and what else there is to report."""

    def prefill(self, context: int) -> Prefill:
        """Run the first `context` tokens of every row and choose the next, from an empty cache.

        Args:
            context: Tokens of each row.
        """

    def decode(self, start: int, new_tokens: int) -> Decode:
        """Choose `new_tokens` tokens a row, the first after `start` tokens.

        With one row an engine goes back to `start` by itself, so that the same may be asked again
        and again; with several it is asked from where it stopped.

        Args:
            start: Tokens of each row before.
            new_tokens: Steps.
        """


def package(name: str) -> ModuleType:
    """An optional package, imported when its engine is asked for and not before."""
    return importlib.import_module(name)
