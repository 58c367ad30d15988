"""The one convention of docstrings, as far as a program can read it; the linter holds the rest."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("Args", "Attributes", "Raises")
# A role such as :func:`name`, or a field such as :param name:
SPHINX = re.compile(r":[a-z]+:`|^\s*:(?:param|return|returns|raises|rtype|type)\b", re.MULTILINE)
# "name: what it is", "name (type): what it is"
ENTRY = re.compile(r"[\w.*, ]+(?:\([^)]*\))?:(?:\s+(?P<text>.*))?")


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """All docstrings of a file, with the line of what they belong to."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def _entries(docstring: str) -> Iterator[str]:
    """The first lines of the entries of sections that name things."""
    inside = False
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            inside = line.rstrip(":") in SECTIONS and line.endswith(":")
        elif inside and re.match(r" {4}\S", line):
            yield line.strip()


def _faults(docstring: str) -> Iterator[str]:
    if "``" in docstring:
        yield "double backticks"
    if role := SPHINX.search(docstring):
        yield f"a Sphinx role or field, {role[0].strip()}"
    for entry in _entries(docstring):
        match = ENTRY.fullmatch(entry)
        if match is None:
            yield f"an entry without a name and a colon: {entry}"
        elif re.match(r"[a-z]|$", match["text"] or ""):
            yield f"an entry that begins small: {entry}"


@pytest.mark.parametrize("folder", ["exporter", "runtime", "samples"])
def test_docstrings_follow_the_convention(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in paths
        for line, docstring in _docstrings(path)
        for fault in _faults(docstring)
    ]
    assert paths
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "docstring",
    [
        "Run the ``graph``.",
        "Run what :meth:`run` runs.",
        "Run the graph.\n\n:param steps: Of the run.",
        "Run the graph.\n\nArgs:\n    steps: of the run.",
        "Run the graph.\n\nArgs:\n    steps (int):\n        Of the run.",
        "Run the graph.\n\nArgs:\n    steps: Of the run.\n\nRaises:\n    RunError: it fails.",
        "A run.\n\nAttributes:\n    Of the run.",
    ],
)
def test_each_fault_is_found(docstring: str) -> None:
    assert len(list(_faults(docstring))) == 1


def test_what_follows_the_convention_passes() -> None:
    """With shapes, code, numbers and second lines in entries."""
    docstring = """Run `graph` :-)

    Args:
        steps: 3 or more, or `None`
            for all: of the run.
        **fields: [B, S] each.

    Returns:
        one: of them.

    Raises:
        RunError, ValueError: It fails.
    """
    assert list(_faults(inspect.cleandoc(docstring))) == []
