"""Which package may import what; the linter holds the same rules for whoever runs it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_TIME = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors"}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", _modules("runtime"), ids=lambda path: path.stem)
def test_runtime_imports_nothing_of_build_time(path: Path) -> None:
    banned = BUILD_TIME | {"echoatt_exporter", "echoatt_cli"}
    assert not banned & set(_imports(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", _modules("exporter/echoatt_cli"), ids=lambda path: path.stem)
def test_command_line_imports_build_time_only_where_it_is_needed(path: Path) -> None:
    """At a module's top, that is: `console` is itself imported by a command that runs."""
    if path.stem == "console":
        return
    top_level = ast.Module(
        [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ],
        type_ignores=[],
    )
    assert not (BUILD_TIME | {"echoatt_exporter", "rich"}) & set(_imports(top_level))


@pytest.mark.parametrize("path", _modules("exporter/echoatt_bench"), ids=lambda path: path.stem)
def test_engines_import_nothing_that_another_engine_would_have_to_hold(path: Path) -> None:
    """Peers are imported by name when they are asked for, and torch's types for checking only."""
    top_level = [
        name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imports(ast.Module([node], type_ignores=[]))
    ]
    own = {"echoatt_bench", "echoatt_runtime", "numpy"}
    assert set(top_level) <= own | set(sys.stdlib_module_names)


def test_help_of_every_command_needs_no_torch() -> None:
    script = """
import sys
from echoatt_cli import main
commands = ("analyze", "share", "export", "rewrite", "parity", "generate", "distill", "evaluate")
for command in (*commands, "bench"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
loaded = {"torch", "transformers", "onnx", "onnx_ir", "echoatt_exporter"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    "path", _modules("exporter/echoatt_exporter/share"), ids=lambda path: path.stem
)
def test_modelling_files_can_be_saved_beside_a_checkpoint(path: Path) -> None:
    if path.stem not in ("modeling_echoatt", "configuration_echoatt"):
        return
    imported = set(_imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert imported <= {"torch", "transformers"} | set(sys.stdlib_module_names)
