"""One tiny checkpoint with an unshared and a shared bundle, for the whole folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoatt_exporter import export_bundle, rewrite_bundle
from echoatt_exporter.bench.engines import EngineSpec, bundle_engines
from echoatt_exporter.bench.shapes import Shape, make_checkpoint

TINY = Shape(
    "llama",
    {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        # so that greedy choices differ from step to step
        "initializer_range": 0.3,
    },
    {50: "1:0,2:0"},
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "checkpoint"
    make_checkpoint(TINY, directory)
    return directory


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineSpec]:
    """The unshared bundle and one with half of the layers following."""
    out = tmp_path_factory.mktemp("bundles")
    unshared = export_bundle(checkpoint, out / "unshared", verify=False).model
    shared = rewrite_bundle(unshared, out / "shared", TINY.plan(50)).model
    return bundle_engines([unshared, shared])
