"""Every family, unshared and shared, by both routes: the bundle computes what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, every_family

from echoatt_exporter import SharingPlan, assert_parity, export_bundle, rewrite_bundle
from echoatt_exporter.share.modeling_echoatt import FAMILIES
from echoatt_runtime import EchoModel

TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, 48).tolist()


def test_every_supported_family_has_a_tiny_model() -> None:
    assert {tiny.family for tiny in TINY_MODELS.values()} == set(FAMILIES)


@every_family
def test_unshared_export_and_its_rewrite_agree_with_pytorch(
    family: str,
    short_checkpoint: Callable[[str], Path],
    short_plan: Callable[[str], SharingPlan],
    tmp_path: Path,
) -> None:
    checkpoint, plan = short_checkpoint(family), short_plan(family)
    unshared, rewritten = tmp_path / "unshared.onnx", tmp_path / "rewritten.onnx"
    report = export_bundle(checkpoint, unshared)
    assert report.manifest.sources == SharingPlan.unshared(plan.num_layers).sources
    assert report.parity is not None
    assert report.parity.passed
    rewrite_bundle(unshared, rewritten, plan)
    assert_parity(checkpoint, rewritten, plan)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sharing_in_pytorch_and_sharing_in_the_graph_agree(
    family: str,
    short_checkpoint: Callable[[str], Path],
    short_plan: Callable[[str], SharingPlan],
    tmp_path: Path,
) -> None:
    checkpoint, plan = short_checkpoint(family), short_plan(family)
    exported, unshared, rewritten = (
        tmp_path / f"{name}.onnx" for name in ("exported", "unshared", "rewritten")
    )
    report = export_bundle(checkpoint, exported, plan)
    assert report.parity is not None
    assert report.parity.passed
    export_bundle(checkpoint, unshared, verify=False)
    rewrite = rewrite_bundle(unshared, rewritten, plan)
    assert rewrite.parameters == report.parameters
    ours, theirs = (EchoModel.load(path).logits(TOKENS) for path in (exported, rewritten))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
