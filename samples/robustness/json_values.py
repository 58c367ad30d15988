"""Spoils JSON: values of other types, absurd numbers, depth, length, keys that are there twice."""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

# Stand for what a Python value cannot be, and are put into the text
_DEEP, _HUGE_NUMBER, _LONG_TEXT = "@deep@", "@huge number@", "@long text@"
_TEXTS: Final = {
    _DEEP: "[" * 100_000 + "]" * 100_000,
    _HUGE_NUMBER: "9" * 100_000,
    _LONG_TEXT: '"' + "x" * 3_000_000 + '"',
}
WEIRD: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "two\nlines",
    "\x1b[31mred",
    "\ud800",
    "../outside/secret",
    [],
    {},
    [[]],
    [1, "a", None],
    [0] * 100_000,
    {str(number): number for number in range(10_000)},
    _DEEP,
    _HUGE_NUMBER,
    _LONG_TEXT,
)


def spoil(random: Random, value: Any) -> tuple[str, str]:
    """The text of a JSON value with one to three places changed, and what was done."""
    root = [json.loads(json.dumps(value))]
    done = [_spoil_one(random, root) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    return to_text(root[0]), "; ".join(done)


def to_text(value: Any) -> str:
    """JSON, with what only stood for something put in."""
    text = json.dumps(value)
    for name, put in _TEXTS.items():
        text = text.replace(json.dumps(name), put)
    return text


def shown(value: Any) -> str:
    """A value in a few characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text)} characters)"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) in a value."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def _spoil_one(random: Random, root: list[Any]) -> str:
    container, key = random.choice(places(root))
    how = random.choice(("set", "set", "set", "scale", "delete", "repeat", "add", "rename"))
    old = container[key]
    if how == "scale" and type(old) is int:
        container[key] = random.choice((old + 1, old - 1, -old, old * 2, old * 1000, old << 40))
        return f"{key}: {old} is {container[key]}"
    if how == "delete" and container is not root:
        del container[key]
        return f"{key} is gone"
    if how == "repeat" and isinstance(container, list) and container is not root:
        times = random.choice((1, 100, 20_000))
        container.extend([old] * times)
        return f"{shown(old)} {times} times more"
    if how == "add" and isinstance(container, dict):
        container["unknown"] = random.choice(WEIRD)
        return f"unknown: {shown(container['unknown'])}"
    if how == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
        return f"{key} is called {key}_"
    container[key] = random.choice(WEIRD)
    return f"{key} is {shown(container[key])}"
