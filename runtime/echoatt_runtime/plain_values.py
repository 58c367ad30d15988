"""What callers give, as Python's own types: numpy's numbers and arrays are as good as those."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np


def as_float(value: object) -> float | None:
    """A finite real number as Python's own; None for anything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_integer(value: object, least: int, most: int | None = None) -> int | None:
    """An integer from `least` to `most` as Python's own; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    number = int(value)
    return number if number >= least and (most is None or number <= most) else None


def as_list(value: object) -> list[object] | None:
    """The items of a list, a tuple or an array; None for anything else, texts and bytes too."""
    if isinstance(value, np.ndarray):
        # A row of a matrix stays an array
        return list(value) if value.ndim > 1 else list(value.tolist()) if value.ndim else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    return None


def kind_of(value: object) -> str:
    """What to call a value's type in an error."""
    return "None" if value is None else type(value).__name__
