"""Draws what the demo's commands print, as `samples/demo.svg` in the README.

    .venv/bin/python samples/make_picture.py

Runs the real commands on `samples/tiny-books`; nothing in the picture is typed by hand.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

SAMPLES = Path(__file__).parent
COMMANDS = (
    "echoatt-export samples/tiny-books {out}/tiny.onnx --plan samples/tiny-books.plan.json",
    "echoatt generate {out}/tiny.onnx '\"My dear Watson,\" said Holmes,'"
    " --temperature 0.6 --top-p 0.9 --seed 1 --max-new-tokens 60",
)


def main() -> None:
    """Run the commands and write the picture."""
    console = Console(record=True, width=124, file=io.StringIO())
    environment = os.environ | {"FORCE_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as directory:
        for command in COMMANDS:
            console.print(f"[bold green]$[/] {command.format(out='out')}", highlight=False)
            program, *arguments = shlex.split(command.format(out=directory))
            done = subprocess.run(
                [Path(sys.executable).with_name(program), *arguments],
                cwd=SAMPLES.parent,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            console.print(Text.from_ansi(done.stdout.replace(directory, "out")))
    console.save_svg(str(SAMPLES / "demo.svg"), title="EchoAtt")


if __name__ == "__main__":
    main()
