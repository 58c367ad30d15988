"""Tiny random models of every supported family, and a sharing plan for each.

They are found: each module of `tests/families` that has `TINY_MODELS` gives some. Weights are large
and everything that usually starts at 0 or 1 is random, so that attention is far from uniform and no
bias, norm or multiplier can be left out unseen.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_family import COMMON, SLIDING_WINDOW, VOCAB_SIZE, TinyModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from echoatt_runtime.contract import SharingPlan

__all__ = [
    "SLIDING_WINDOW",
    "TINY_MODELS",
    "VOCAB_SIZE",
    "TinyModel",
    "build_tiny_model",
    "every_family",
    "tiny_plan",
]

_FAMILY_FILES = sorted(
    path.stem
    for path in Path(__file__).with_name("families").glob("*.py")
    if not path.stem.startswith("test_")
)

# By name: a family or a variant of one
TINY_MODELS: dict[str, TinyModel] = {
    name: tiny
    for file in _FAMILY_FILES
    for name, tiny in importlib.import_module(f"tests.families.{file}").TINY_MODELS.items()
}

# For a test with an argument `family`: run it on each of them
every_family = pytest.mark.parametrize("family", list(TINY_MODELS))


def build_tiny_model(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny random model, the same for the same arguments, in evaluation mode.

    Args:
        name: A key of `TINY_MODELS`.
        seed: For the weights.
        fields: Config fields that differ from the variant's.
    """
    tiny = TINY_MODELS[name]
    common = {key: value for key, value in COMMON.items() if key not in tiny.unknown}
    config = AutoConfig.for_model(tiny.family, **{**common, **tiny.fields, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases start at 0, norms at 0 or 1
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * 0.25)
    model.eval()
    return model


def tiny_plan(name: str) -> SharingPlan:
    """The sharing plan of `TINY_MODELS[name]`."""
    return SharingPlan(TINY_MODELS[name].sources)
