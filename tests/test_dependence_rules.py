"""Which package may import what; the linter holds the same rules for whoever runs it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_TIME = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors"}
EXPORTER = {"echoatt_bench", "echoatt_cli", "echoatt_exporter"}
STANDARD = set(sys.stdlib_module_names)

# What of the runtime others may use
PUBLIC = {
    "echoatt_runtime",
    "echoatt_runtime.bundle",
    "echoatt_runtime.cache",
    "echoatt_runtime.contract",
    "echoatt_runtime.errors",
    "echoatt_runtime.executor",
    "echoatt_runtime.generation",
    "echoatt_runtime.measures",
    "echoatt_runtime.ort",
    "echoatt_runtime.text",
}


class Import(NamedTuple):
    """An imported module, and the name taken from it, if one is."""

    line: int
    module: str
    name: str | None = None

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def _imports(node: ast.AST) -> Iterator[Import]:
    """All imports below a node, those by a constant name at run time too."""
    for child in ast.walk(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(child.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (Import(child.lineno, module, alias.name) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(child.lineno, module)


def _packages(node: ast.AST) -> set[str]:
    return {found.package for found in _imports(node)}


def _top_level(path: Path) -> ast.Module:
    """The imports at a module's top; those for types only are not among them."""
    body = [node for node in _parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.Module(body, type_ignores=[])


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _modules(folder: str, *, without: str = "") -> list[Path]:
    found = [path for path in sorted((ROOT / folder).rglob("*.py")) if path.stem != without]
    assert found
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", _modules("runtime"), ids=_name)
def test_runtime_imports_nothing_of_build_time(path: Path) -> None:
    own = {"echoatt_runtime", "jinja2", "numpy", "onnxruntime", "tokenizers"}
    assert _packages(_parse(path)) <= own | STANDARD


def test_the_linter_bans_the_same_in_the_runtime() -> None:
    config = tomllib.loads((ROOT / "runtime" / "ruff.toml").read_text(encoding="utf-8"))
    assert set(config["lint"]["flake8-tidy-imports"]["banned-api"]) == BUILD_TIME | EXPORTER


def test_exporter_uses_only_the_runtimes_public_names() -> None:
    deeper = [
        f"{_name(path)}:{found.line}: {found.module} {found.name or ''}"
        for path in _modules("exporter")
        for found in _imports(_parse(path))
        if found.package == "echoatt_runtime" and not _is_public(found)
    ]
    assert deeper == []


def test_the_linter_bans_what_is_not_public_in_the_exporter() -> None:
    config = tomllib.loads((ROOT / "exporter" / "ruff.toml").read_text(encoding="utf-8"))
    modules = {
        ".".join(path.relative_to(ROOT / "runtime").with_suffix("").parts).removesuffix(".__init__")
        for path in _modules("runtime/echoatt_runtime")
    }
    banned = set(config["lint"]["flake8-tidy-imports"]["banned-api"])
    assert banned == modules - PUBLIC


def _is_public(found: Import) -> bool:
    """A public module as a whole, or a name of it, which a package must list."""
    if found.module not in PUBLIC or found.name is None:
        return found.module in PUBLIC
    module = importlib.import_module(found.module)
    if hasattr(module, "__path__"):
        return found.name in getattr(module, "__all__", ())
    return not found.name.startswith("_")


def test_nobody_imports_what_another_module_keeps_to_itself() -> None:
    """Attributes are the linter's part, whose SLF001 knows them."""
    private = [
        f"{_name(path)}:{found.line}: {found.module} {found.name or ''}"
        for folder in ("exporter", "runtime", "samples")
        for path in _modules(folder)
        for found in _imports(_parse(path))
        for part in (*found.module.split("."), found.name or "")
        if part.startswith("_") and not part.startswith("__")
    ]
    assert private == []


@pytest.mark.parametrize("path", _modules("exporter/echoatt_cli", without="console"), ids=_name)
def test_command_line_imports_build_time_only_where_it_is_needed(path: Path) -> None:
    """At a module's top, that is; `console` is itself imported by a command that runs."""
    assert not (BUILD_TIME | {"echoatt_exporter", "rich"}) & _packages(_top_level(path))


@pytest.mark.parametrize("path", _modules("exporter/echoatt_bench"), ids=_name)
def test_engines_import_nothing_that_another_engine_would_have_to_hold(path: Path) -> None:
    """Peers are imported by name when they are asked for, and torch's types for checking only."""
    own = {"echoatt_bench", "echoatt_runtime", "numpy"}
    assert _packages(_top_level(path)) <= own | STANDARD


def test_help_of_every_command_needs_no_torch() -> None:
    script = """
import sys
from echoatt_cli import main
commands = ("analyze", "share", "refit", "distill", "evaluate", "export", "rewrite", "parity")
for command in (*commands, "generate", "bench"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
loaded = {"torch", "transformers", "onnx", "onnx_ir", "echoatt_exporter"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["modeling_echoatt", "configuration_echoatt"])
def test_modelling_files_can_be_saved_beside_a_checkpoint(name: str) -> None:
    path = ROOT / "exporter" / "echoatt_exporter" / "share" / f"{name}.py"
    assert _packages(_parse(path)) <= {"torch", "transformers"} | STANDARD


def test_the_file_check_loads_a_model_without_torch() -> None:
    path = ROOT / "exporter" / "echoatt_exporter" / "graph" / "checks" / "load_file.py"
    assert _packages(_parse(path)) <= {"echoatt_runtime", "onnxruntime"} | STANDARD
