"""The fuzz's command on its first 300 cases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
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
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert (found["cases"], found["faults"]) == (CASES, {})
    outcomes: Counter[str] = Counter()
    for counts in found["families"].values():
        outcomes.update(counts)
    assert outcomes.total() == CASES
    # Not all are refused at the door, and not for the same reason
    assert outcomes["works"] > CASES // 10
    assert set(outcomes) >= {"DamagedBundleError", "CheckpointError", "ChatTemplateError"}
    page = (tmp_path / "fuzz.md").read_text()
    assert "| all | 300 |" in page
    assert str(ROOT) not in page
