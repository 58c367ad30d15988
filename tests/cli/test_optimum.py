"""What the wheel puts into optimum's folder, with the extra `export` installed and without."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "exporter" / "optimum_register" / "register_echoatt.py"

# None in sys.modules is what an import of something that is not installed finds.
SCRIPT = """
import importlib.util, sys
path, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
name = "optimum.commands.register.register_echoatt"
spec = importlib.util.spec_from_file_location(name, path)
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", "export", "--help"]
try:
    main()
finally:
    print("loaded:", *sorted(name for name in sys.modules if name.startswith("echoatt")))
"""


def export_help(*absent: str) -> str:
    """What `optimum-cli export --help` says, and which modules of EchoAtt it imported."""
    command = [sys.executable, "-c", SCRIPT, REGISTER, *absent]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_optimum_lists_the_export() -> None:
    shown = export_help()
    assert re.search(r"\bechoatt +export a checkpoint", shown)
    assert "echoatt_exporter" not in shown


@pytest.mark.parametrize("absent", ["onnxscript", "rich", "torch"])
def test_users_of_the_runtime_alone_notice_nothing(absent: str) -> None:
    shown = export_help(absent)
    assert "usage: optimum-cli" in shown
    assert "echoatt" not in shown


def test_the_packages_asked_for_are_those_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["export"]
    names = [re.split(r"[^\w-]", line)[0].replace("-", "_") for line in extra]
    spec = importlib.util.spec_from_file_location("register_echoatt", REGISTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.NEEDED) == sorted(names)
