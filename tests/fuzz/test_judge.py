"""The judge finds what must not be; each fault is planted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Forked for every case, so in a process of its own, which has one thread
SCRIPT = """
import ctypes, json, os, subprocess, sys, time
from pathlib import Path
from samples.robustness.cases import FAMILIES, Case
from samples.robustness.judge import Limits, judge_all
from samples.robustness.target import SECRET, Goods
from echoatt_runtime.errors import EchoAttError

class Spoken(EchoAttError):
    def __str__(self):
        return self.args[0] * 1000

def escape(error):
    def fail():
        raise error
    return fail

libc = ctypes.CDLL(None)
secret = Path("outside", "secret")
STEPS = {
    "nothing": lambda: None,
    "typed": escape(EchoAttError("said\\nin two lines")),
    "untyped": escape(ValueError("no")),
    "two lines": escape(type("Two", (EchoAttError,), {"__str__": lambda _: "a\\nb"})()),
    "long": escape(Spoken("long ")),
    "tells": escape(EchoAttError(SECRET)),
    "crash": lambda: os.kill(os.getpid(), 11),
    "memory": lambda: bytearray(1 << 28),
    "busy": lambda: any(iter(int, 1)),
    "asleep": lambda: time.sleep(60),
    "silent": lambda: os._exit(0),
    "reads": lambda: secret.read_text(),
    "reads below Python": lambda: libc.open(bytes(secret), 0),
    "runs": lambda: subprocess.run(["true"]),
    "pickle": lambda: Path("ran").touch(),
}

work = Path(sys.argv[1])
for name in ("one", "other"):
    (work / name).mkdir()
    (work / name / "model.onnx").write_bytes(bytes(range(256)))
goods = Goods({name: work / name for name in ("one", "other")}, {})
number = list(FAMILIES["bundle"]).index("cut")
found = {}
for planted, step in STEPS.items():
    def use(case, target):
        (target.outside / "secret").write_text(SECRET)
        return iter([(planted, step)])
    # Only sleep need be waited for; the rest may be slow where others are at work
    wall = 2 if planted == "asleep" else 60
    limits = Limits(memory=1 << 27, processor_seconds=1, wall_seconds=wall)
    (verdict,) = judge_all([Case.of(0, number)], goods, use, work, limits=limits)
    found[planted] = verdict.outcome, verdict.faults
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """By what was planted, the outcome and the faults that were found."""
    command = (sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("judge")))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("planted", "outcome", "fault"),
    [
        ("nothing", "works", ""),
        ("typed", "EchoAttError", ""),
        ("untyped", "ValueError", "ValueError in untyped is no EchoAttError"),
        ("two lines", "Two", "is not one line"),
        ("long", "Spoken", "has 4000 characters"),
        ("tells", "EchoAttError", "tells what is outside"),
        ("crash", "died", "died of SIGSEGV in crash"),
        ("memory", "MemoryError", "is no EchoAttError"),
        ("busy", "died", "took more than 1 s in busy"),
        ("asleep", "died", "took more than 2 s in asleep"),
        ("silent", "died", "said nothing"),
        ("reads", "works", "opened secret, which is outside"),
        ("reads below Python", "works", "opened secret, which is outside"),
        ("runs", "works", "subprocess.Popen"),
        ("pickle", "works", "ran a pickle's code"),
    ],
)
def test_what_must_not_be_is_found(
    planted: str, outcome: str, fault: str, verdicts: dict[str, tuple[str, list[str]]]
) -> None:
    found, faults = verdicts[planted]
    assert found == outcome
    assert fault in "; ".join(faults)
    assert bool(fault) == bool(faults)
