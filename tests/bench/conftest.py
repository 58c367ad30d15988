"""A tiny shape with an unshared and a shared bundle, for the whole folder: one export in all."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoatt_exporter import rewrite_bundle
from echoatt_exporter.bench.engines import EngineSpec, bundle_engines
from echoatt_exporter.bench.prepare import ShapeRequest, prepare_shape
from echoatt_exporter.bench.shapes import SHAPES, Shape

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
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory in which the shape "tiny" has been made, unshared in fp32."""
    directory = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", TINY)
        request = ShapeRequest("tiny", "fp32", ["unshared"])
        prepare_shape(request, directory, peers=[], on_step=lambda _: None)
    return directory


@pytest.fixture(scope="session")
def checkpoint(work: Path) -> Path:
    return work / "tiny" / "checkpoint"


@pytest.fixture(scope="session")
def bundles(work: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EngineSpec]:
    """The unshared bundle and one with half of the layers following."""
    (unshared,) = work.glob("tiny/fp32-*/model.onnx")
    out = tmp_path_factory.mktemp("bundles") / "shared"
    return bundle_engines([unshared, rewrite_bundle(unshared, out, TINY.plan(50)).model])
