"""The fuzz's command on its first 300 cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = 300


def test_every_case_ends_well_or_in_a_typed_error_of_one_line(tmp_path: Path) -> None:
    # In a process of its own: it forks for every case, which wants one thread
    command = (sys.executable, "-m", "samples.robustness.fuzz", "--cases", str(CASES))
    done = subprocess.run(
        (*command, "--workers", "2", "--results", str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "fuzz.json").read_text())["cases"]
    assert [case["number"] for case in cases] == list(range(CASES))
    outcomes = {case["outcome"] for case in cases}
    # Not all are refused at the door, and not for the same reason
    assert outcomes >= {"works", "DamagedBundleError", "CheckpointError", "ChatTemplateError"}
    page = (tmp_path / "fuzz.md").read_text()
    assert "| all | 300 |" in page
    assert str(ROOT) not in page
