"""Checkpoints that are changed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.wording import says

from echoatt_exporter import SharingPlan, load_shared

WEIGHTS = "model.safetensors"
QUERIES = "model.layers.2.self_attn.q_proj.weight"


def edit_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {k: v.clone() for k, v in load_file(directory / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refused(
    error: type[Exception], directory: Path, *parts: str, plan: SharingPlan | None = None
) -> None:
    """`load_shared` refuses with exactly `error`, in one line that has every part in it."""
    with pytest.raises(error) as caught:
        load_shared(directory, plan)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(directory), *parts):
        assert says(message, part), message


def shard(directory: Path) -> None:
    """Store the weights as two shards with an index."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = {
        1: [k for k in tensors if "layers.5" not in k],
        2: [k for k in tensors if "layers.5" in k],
    }
    weight_map: dict[str, str] = {}
    for number, held in names.items():
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in held}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
