"""Where the public checkpoints are that some tests try, or why a test that needs one is skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import pytest

Name = Literal["smollm2", "qwen-coder"]

_VARIABLES: Final[dict[Name, str]] = {
    "smollm2": "ECHOATT_SMOLLM2",
    "qwen-coder": "ECHOATT_QWEN_CODER",
}
# Beside the repository, as the other trained checkpoints
_MODELS: Final = Path(__file__).resolve().parents[2] / "shared" / "models"


def real_checkpoint(name: Name) -> Path:
    """The Hugging Face directory of a public checkpoint; skips the test where it is absent.

    An environment variable names the directory; else it is looked for beside the repository.
    """
    variable = _VARIABLES[name]
    path = Path(os.environ.get(variable) or _MODELS / name)
    if not (path / "config.json").is_file():
        pytest.skip(
            f"{path} is absent: make it with shared/models/public.py {name} OUT and name it in"
            f" {variable}"
        )
    return path
