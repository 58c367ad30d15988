"""What a run decides by itself: the length of the stages and the kind of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import build_tiny_model

from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.resolve import resolve_config, stages_of
from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.matching_models import check_tokens


def _resolved(
    *, length: int = 64, rows: int = 103, device: str = "cpu", family: str = "llama", **values: Any
) -> DistillConfig:
    config = build_tiny_model(family).config
    return resolve_config(DistillConfig.of(values), length, rows, 4, config, device)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, (20, 5)),  # 25 whole steps of text, each read once
        ({"stage1_steps": 8}, (8, 2)),
        ({"stage1_steps": 9}, (9, 3)),
        ({"stage1_tokens": 2 * 256 + 1, "stage2_tokens": 256}, (3, 1)),
        ({"stage1_steps": 0, "stage2_steps": 7}, (0, 7)),
        ({"stage2_steps": 0}, (20, 0)),
    ],
)
def test_length_of_the_stages(values: dict[str, Any], steps: tuple[int, int]) -> None:
    resolved = _resolved(**values)
    assert tuple(stage.steps for stage in stages_of(resolved)) == steps
    # settling again, as a run does that is given its own distill.yaml, changes nothing
    assert _resolved(**resolved.to_dict()) == resolved


def test_learning_rates() -> None:
    rates = [stage.learning_rate for stage in stages_of(_resolved(learning_rate=0.5))]
    assert rates == [0.5, 0.5]
    resolved = _resolved(learning_rate=0.5, stage2_learning_rate=0.1)
    assert [stage.learning_rate for stage in stages_of(resolved)] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("values", "attention"),
    [
        ({"length": 256}, "materialized"),
        ({"length": 257}, "recomputed"),
        ({"length": 64, "device": "cuda"}, "recomputed"),
        ({"length": 512, "device": "cuda", "family": "gemma2"}, "materialized"),
        ({"length": 512, "attention": "materialized"}, "materialized"),
        ({"length": 64, "attention": "recomputed"}, "recomputed"),
    ],
)
def test_attention_is_chosen_by_length_and_device(values: dict[str, Any], attention: str) -> None:
    assert _resolved(**values).attention == attention


def test_another_models_tokenizer_is_refused() -> None:
    rows = torch.tensor([[1, 60], [61, 2]])
    check_tokens("dir", rows, 62)
    with pytest.raises(CheckpointError, match=r"dir: its tokenizer gives token 61 .* has 61; it"):
        check_tokens("dir", rows, 61)
