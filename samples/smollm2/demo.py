"""A real model, start to end: fetch, analyse, export with and without sharing, chat, compare.

    make demo-smollm2

Every step is a command that is printed before it runs; what it makes lies in `demo/smollm2`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HOME = Path("demo/smollm2")
MODEL = HOME / "model"
ANALYSIS = HOME / "analysis"
TEXTS = [str(path) for path in sorted(Path("samples/texts").glob("*.md"))]
QUESTION = "What is the capital of France?"
# Layers of 30 that shall follow another one; untrained, each costs something
RATIO = "0.1"
BUNDLES = {
    "every layer with its own attention": HOME / "unshared" / "smollm2.onnx",
    "3 of 30 layers with another's": HOME / "shared" / "smollm2.onnx",
}


def run(*words: str | Path) -> None:
    """Print a command of ours, run it, and end with it if it fails."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}", flush=True)
    begin = time.perf_counter()
    program = str(Path(sys.executable).with_name(command[0]))
    code = subprocess.run([program, *command[1:]], check=False).returncode
    if code:
        sys.exit(code)
    print(f"({time.perf_counter() - begin:.0f} s)", flush=True)


def main() -> None:
    """Run all steps; what an earlier run made of checkpoint and analysis is used again."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not MODEL.is_dir():
        run("python", "-m", "samples.smollm2.make_checkpoint", MODEL)
    if not (ANALYSIS / "plan.json").is_file():
        run(
            "echoatt", "analyze", MODEL, "--text", *TEXTS, "--out", ANALYSIS, "--ratio", RATIO,
            "--length", "256", "--samples", "8", "--calibration-windows", "2", "--force",
        )  # fmt: skip
    unshared, shared = BUNDLES.values()
    options = ("--dtype", "int4", "--calibration", *TEXTS, "--force")
    run("echoatt-export", MODEL, unshared, *options)
    run("echoatt-export", MODEL, shared, "--plan", ANALYSIS / "plan.json", *options)
    for title, bundle in BUNDLES.items():
        print(f"\n{title}:", flush=True)
        run("echoatt", "generate", bundle, QUESTION, "--chat", "--max-new-tokens", "40", "--stats")
    print("\nWhat sharing cost, before any healing:", flush=True)
    run(
        "echoatt", "evaluate", shared, "--against", unshared, "--text", TEXTS[-1],
        "--length", "256", "--max-tokens", "1024",
    )  # fmt: skip


if __name__ == "__main__":
    main()
