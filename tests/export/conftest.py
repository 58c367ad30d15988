"""Checkpoints on disk, cut to few layers: torch's tracing takes seconds for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import TINY_MODELS, build_tiny_model

from echoatt_exporter import SharingPlan, export_bundle


@pytest.fixture(scope="session")
def short_plan() -> Callable[[str], SharingPlan]:
    """`short_plan(name)`: the plan of `short_checkpoint`, at least 40 % followers."""

    def plan(name: str) -> SharingPlan:
        found = SharingPlan(TINY_MODELS[name].sources[: TINY_MODELS[name].exported_layers])
        assert found.ratio >= 0.4
        return found

    return plan


@pytest.fixture(scope="session")
def short_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`short_checkpoint(name)`: the directory of a tiny model with its first layers only."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            layers = TINY_MODELS[name].exported_layers
            fields: dict[str, Any] = {
                key: value[:layers]
                for key, value in TINY_MODELS[name].fields.items()
                if isinstance(value, list)
            }
            made[name] = tmp_path_factory.mktemp(name)
            model = build_tiny_model(name, num_hidden_layers=layers, **fields)
            model.save_pretrained(made[name])
        return made[name]

    return checkpoint


@pytest.fixture(scope="session")
def unshared_bundle(
    short_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An unshared, verified bundle of the tiny Llama; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("bundle") / "tiny.onnx"
    return export_bundle(short_checkpoint("llama"), out).model
