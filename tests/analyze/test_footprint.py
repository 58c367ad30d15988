"""Footprints against the modules of real students, the paper's figures and sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import SLIDING_WINDOW, TINY_MODELS, every_family
from tests.wording import whole
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from echoatt_exporter import SharingPlan, share_attention
from echoatt_exporter.analyze.footprint import footprint_of
from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]

TINYLLAMA = LlamaConfig(
    num_hidden_layers=22,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    vocab_size=32000,
    max_position_embeddings=2048,
)
# The three plans of the paper, see the design
PAPER = {
    24: "2:1,3:1,4:1,5:1,7:6",
    43: ",".join(f"{f}:1" for f in range(2, 10)) + ",18:17",
    80: ",".join(f"{f}:0" for f in range(1, 15)) + ",16:15,17:15,18:15",
}


@pytest.mark.parametrize(("millions", "pairs"), PAPER.items())
def test_the_papers_plans_remove_what_the_paper_says(millions: int, pairs: str) -> None:
    plan = SharingPlan.from_pairs(pairs, 22)
    footprint = footprint_of(TINYLLAMA, plan, context=2048)
    assert footprint.teacher.parameters == 1_100_048_384
    assert footprint.parameters_removed == len(plan.followers) * (2048 * 2048 + 2048 * 256)
    # 23.6, 42.5 and 80.2; the paper has 43 for the second
    assert abs(footprint.parameters_removed / 1e6 - millions) < 0.6
    assert footprint.parameters_removed_share == footprint.parameters_removed / 1_100_048_384


def test_every_figure_by_hand() -> None:
    plan = SharingPlan.from_pairs("3:2", 22)
    footprint = footprint_of(TINYLLAMA, plan, context=1000, bytes_per_element=0.5)
    table = 32000 * 2048
    layer = 2048 * (2048 + 256 + 256) + 2048 * 2048 + 3 * 2048 * 5632
    assert footprint.teacher.decode_multiply_adds == 22 * (layer + 2 * 2048 * 1000) + table
    assert footprint.student.decode_multiply_adds == (
        footprint.teacher.decode_multiply_adds - 2048 * (2048 + 256) - 2048 * 1000
    )
    assert footprint.teacher.forward_multiply_adds == 22 * (layer + 2 * 2048 * 500.5) + table
    assert footprint.cache_bytes_per_token == (21 * 2 + 1) * 256 * 0.5
    # the table's rows are not all read, the LM head's are
    assert footprint.student.decode_bytes == (
        (footprint.parameters - table) * 0.5 + 1000 * footprint.cache_bytes_per_token
    )
    teacher_bytes = (1_100_048_384 - table) * 0.5 + 1000 * 44 * 256 * 0.5
    assert footprint.estimated_speed == teacher_bytes / footprint.student.decode_bytes


@every_family
@torch.no_grad()
def test_parameters_and_arithmetic_are_those_of_a_real_student(
    family: str, tiny_model: Models
) -> None:
    plan = SharingPlan(TINY_MODELS[family].sources)
    teacher = tiny_model(family)
    config = teacher.config
    footprint = footprint_of(config, plan, context=17)
    assert footprint.teacher.parameters == teacher.num_parameters()
    student = share_attention(teacher, plan)
    assert footprint.parameters == student.num_parameters()
    cache = student(torch.ones(1, 1, dtype=torch.int64)).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert footprint.cache_bytes_per_token == 2 * elements
    # A token that attends to itself alone does, but for projections, H·D a product
    counter = FlopCounterMode(display=False)
    with counter:
        student(torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    alone = footprint_of(config, plan, context=1)
    assert 2 * alone.student.decode_multiply_adds == counter.get_total_flops()
    assert alone.student.forward_multiply_adds == alone.student.decode_multiply_adds


def test_a_sliding_window_bounds_what_is_read(tiny_model: Models) -> None:
    config = tiny_model("gemma2").config  # three sliding layers, three full ones; a tied table
    plan = SharingPlan((0, 1, 0, 1, 4, 5))
    footprint = footprint_of(config, plan, context=40, bytes_per_element=1)
    cache_width, query_width = 2 * 12, 4 * 12
    assert footprint.student.decode_bytes == footprint.parameters + cache_width * (
        5 * SLIDING_WINDOW + 5 * 40
    )
    # what a token attends to at each position, by the masks themselves
    attended = torch.ones(40, 40).tril()
    windowed = attended.triu(1 - SLIDING_WINDOW)
    shared = footprint.teacher.forward_multiply_adds - footprint.student.forward_multiply_adds
    removed = query_width * (attended + windowed).sum().item() / 40 + 2 * 32 * (48 + 24)
    assert shared == pytest.approx(removed)
    assert 0 < footprint.forward_multiply_adds_removed_share < 1
    assert 0 < footprint.decode_multiply_adds_removed_share < 1


def test_what_cannot_be_counted_is_refused() -> None:
    plan = SharingPlan.unshared(22)
    with pytest.raises(AnalysisError, match="a context of 2049 tokens is outside"):
        footprint_of(TINYLLAMA, plan, context=2049)
    with pytest.raises(AnalysisError, match=whole("0 bytes an element")):
        footprint_of(TINYLLAMA, plan, context=1, bytes_per_element=0)
    with pytest.raises(PlanError, match=whole("the plan has 3 layers and the model 22")):
        footprint_of(TINYLLAMA, SharingPlan.unshared(3), context=1)
