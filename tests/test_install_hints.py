"""What messages tell people to install can be installed: EchoAtt itself is on no index."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def texts() -> Iterator[tuple[str, str]]:
    """Every text in the code, with its place."""
    for folder in ("exporter", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_no_message_names_a_package_that_no_index_has() -> None:
    hints = [(place, text) for place, text in texts() if re.search(r"pip (un)?install", text)]
    assert len(hints) >= 5
    ours = re.compile(r"echoatt\[|install (-\w+ )*'?echoatt", re.IGNORECASE)
    assert [place for place, text in texts() if ours.search(text)] == []


def test_a_command_names_the_extras_that_it_lacks() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    program = """
import sys
sys.modules["safetensors"] = None  # What the import system does for a package it cannot find
from echoatt_cli import main
sys.exit(main(sys.argv[1:]))
"""
    for command, arguments in (
        ("analyze", ["model", "--text", "a.txt", "--out", "out"]),
        ("share", ["model", "out", "--share", "1:0"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, command, *arguments], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert "safetensors is not installed" in done.stderr
        named = re.search(r"in EchoAtt's own directory, pip install '\.\[(.*)\]'", done.stderr)
        assert named is not None
        assert set(named[1].split(",")) <= extras.keys()
