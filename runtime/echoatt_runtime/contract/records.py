"""Reads records out of JSON: which field has which type, what may be missing, what is not known.

A reader turns a JSON value into a field's value, or raises `WrongTypeError` with what it expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

_Record = TypeVar("_Record")

# Longer lists than any decoder has layers, caches, end tokens or files; each costs time to check
_LONGEST_LIST: Final = 16384


class WrongTypeError(Exception):
    """A JSON value is not what a field holds; the message says what that is."""


Reader = Callable[[Any], Any]

# More faults than anybody reads
_MOST_FAULTS: Final = 8


def join_faults(faults: Sequence[str]) -> str:
    """Faults as one phrase: the first few, and how many more there are."""
    more = len(faults) - _MOST_FAULTS
    shown = [*faults[:_MOST_FAULTS], *([f"and {more} more"] if more > 0 else [])]
    return "; ".join(shown)


@dataclass(frozen=True, slots=True)
class Field:
    """How one field is read.

    Attributes:
        read: What turns the JSON value into the field's.
        may_be_missing: Whether the record's own default stands for an absent field.
    """

    read: Reader
    may_be_missing: bool = False


def read_fields(
    data: Mapping[str, Any], fields: Mapping[str, Field]
) -> tuple[dict[str, Any], list[str]]:
    """Read an object's fields.

    Returns:
        What could be read, with everything else under "unknown", and the faults.
    """
    values: dict[str, Any] = {}
    faults = []
    for name, field in fields.items():
        if name not in data:
            if not field.may_be_missing:
                faults.append(f"{name} is missing")
            continue
        try:
            values[name] = field.read(data[name])
        except WrongTypeError as error:
            faults.append(f"{name} is not {error}")
    values["unknown"] = {name: value for name, value in data.items() if name not in fields}
    return values, faults


def record(make: Callable[..., _Record], fields: Mapping[str, Field]) -> Reader:
    """The reader of an object with these fields."""

    def read(value: Any) -> _Record:
        if not isinstance(value, dict):
            raise WrongTypeError("an object")
        values, faults = read_fields(value, fields)
        if faults:
            raise WrongTypeError(f"right inside ({join_faults(faults)})")
        return make(**values)

    return read


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise WrongTypeError("a string")
    return value


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WrongTypeError("true or false")
    return value


def integer(value: Any) -> int:
    """An integer that fits 64 bits."""
    if type(value) is not int or abs(value) >= 2**63:
        raise WrongTypeError("an integer of 64 bits")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongTypeError("a finite number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise WrongTypeError("a finite number")
    return found


def optional(read: Reader) -> Reader:
    """What `read` takes, or null."""

    def read_or_null(value: Any) -> Any:
        if value is None:
            return None
        try:
            return read(value)
        except WrongTypeError as error:
            raise WrongTypeError(f"{error} or null") from None

    return read_or_null


def many(read: Reader, what: str) -> Reader:
    """A list, as a tuple.

    Args:
        read: Reads an item.
        what: The items, for messages, such as "integers".
    """

    def read_all(value: Any) -> Sequence[Any]:
        if not isinstance(value, list) or len(value) > _LONGEST_LIST:
            raise WrongTypeError(f"a list of {what}")
        try:
            return tuple(map(read, value))
        except WrongTypeError as error:
            inside = f": {error}" if str(error).startswith("right inside") else ""
            raise WrongTypeError(f"a list of {what}{inside}") from None

    return read_all


def any_of(first: Reader, second: Reader, what: str) -> Reader:
    """What one of two readers takes."""

    def read_either(value: Any) -> Any:
        for read in (first, second):
            try:
                return read(value)
            except WrongTypeError:
                continue
        raise WrongTypeError(what)

    return read_either
