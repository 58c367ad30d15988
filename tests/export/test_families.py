"""Every family, unshared and shared, by both routes: the bundle computes what PyTorch computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

from echoatt_exporter import SharingPlan, assert_parity, export_bundle, rewrite_bundle
from echoatt_exporter.families import FAMILIES, Family
from echoatt_runtime import EchoModel

TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, 48).tolist()
VARIANTS = [name for name in TINY_MODELS if name not in FAMILIES]


def _export_and_rewrite(
    checkpoint: Path, plan: SharingPlan, directory: Path, family: Family
) -> tuple[Path, int]:
    """Both ratios on one route: export unshared, then share in the graph; each against PyTorch."""
    unshared, rewritten = directory / "unshared.onnx", directory / "rewritten.onnx"
    report = export_bundle(checkpoint, unshared)
    assert (
        report.manifest.specification.plan.sources == SharingPlan.unshared(plan.num_layers).sources
    )
    assert report.parity is not None
    assert report.parity.passed
    rewrite = rewrite_bundle(unshared, rewritten, plan)
    assert_parity(checkpoint, rewritten, plan)
    for model in (unshared, rewritten):
        assert _computes_wanted_rows_only(model, family, plan.num_layers - 1)
    return rewritten, rewrite.parameters


def _computes_wanted_rows_only(path: Path, family: Family, layer: int) -> bool:
    """Whether the layer's products behind its attention read looked-up rows."""
    attention, output = (re.escape(name) for name in (family.attention, family.output))
    behind = re.compile(
        rf"{re.escape(family.layers)}\.{layer}\.(?!{attention}\.(?!{output}\b)).*weight"
    )
    looked_up: set[str] = set()
    found = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "GatherElements" or looked_up & set(node.input):
            looked_up |= set(filter(None, node.output))
        weight = behind.search(" ".join(node.input[1:]))
        if node.op_type == "MatMul" and weight is not None:
            found.append(node.input[0] in looked_up)
    assert len(found) >= 3
    return all(found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_agrees_with_pytorch(
    variant: str,
    short_checkpoint: Callable[[str], Path],
    short_plan: Callable[[str], SharingPlan],
    tmp_path: Path,
) -> None:
    family = FAMILIES[TINY_MODELS[variant].family]
    _export_and_rewrite(short_checkpoint(variant), short_plan(variant), tmp_path, family)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family_agrees_with_pytorch_and_both_routes_with_each_other(
    family: str,
    short_checkpoint: Callable[[str], Path],
    short_plan: Callable[[str], SharingPlan],
    tmp_path: Path,
) -> None:
    checkpoint, plan = short_checkpoint(family), short_plan(family)
    known = FAMILIES[family]
    rewritten, parameters = _export_and_rewrite(checkpoint, plan, tmp_path, known)
    report = export_bundle(checkpoint, tmp_path / "exported.onnx", plan)
    assert report.parity is not None
    assert report.parity.passed
    assert report.parameters == parameters
    ours, theirs = (EchoModel.load(path).logits(TOKENS) for path in (report.model, rewritten))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
