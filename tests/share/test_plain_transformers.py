"""A saved student where EchoAtt is not installed: transformers and the two files beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from echoatt_exporter import EchoAttForCausalLM, SharingPlan, load_shared
from echoatt_exporter.families import FAMILIES
from echoatt_exporter.share.save import save_student

Models = Callable[..., Any]
MODELS = ("llama_tied_biased", *FAMILIES)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

SCRIPT = f"""
import sys
for name in ("echoatt_exporter", "echoatt_runtime", "echoatt_cli"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
for directory in sys.argv[1:]:
    expected = torch.load(directory + ".pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    assert torch.equal(logits, expected["logits"]), directory
    assert torch.equal(model.generate(expected["tokens"], **{GREEDY}), expected["generated"])
    model.save_pretrained(directory + "_again")
"""


@torch.no_grad()
def test_students_load_and_generate_without_echoatt(
    student_of: Models, tokens: torch.Tensor, tmp_path: Path
) -> None:
    directories = [tmp_path / family for family in MODELS]
    for family, directory in zip(MODELS, directories, strict=True):
        student: EchoAttForCausalLM = student_of(family)
        if family == "phi3":
            save_student(student, directory, tmp_path)
        else:  # as the Trainer does
            student.save_pretrained(directory)
        loaded = load_shared(directory, None)
        expected = {
            "tokens": tokens,
            "logits": loaded(tokens).logits,
            "generated": loaded.generate(tokens, **GREEDY),  # type: ignore[operator]
        }
        torch.save(expected, f"{directory}.pt")

    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, directories)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=True,
    )

    # What was saved there is a student here again
    again = load_shared(f"{directories[0]}_again", None)
    assert torch.equal(again(tokens).logits, load_shared(directories[0], None)(tokens).logits)


def test_the_code_in_a_students_directory_is_not_run_here(
    student_of: Models, tmp_path: Path
) -> None:
    directory = tmp_path / "student"
    student_of("llama", SharingPlan((0, 1, 1, 3, 4, 5))).save_pretrained(directory)
    for name in ("modeling_echoatt.py", "configuration_echoatt.py"):
        (directory / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (
        lambda: load_shared(directory, None),
        lambda: load_shared(directory, None, trust_remote_code=True),
        lambda: AutoModelForCausalLM.from_pretrained(directory),
        lambda: AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True),
    ):
        assert type(load()) is EchoAttForCausalLM
    assert not (tmp_path / "ran").exists()
