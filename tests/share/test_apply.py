"""Applying a plan: what is refused, and what the student takes over from its teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.wording import whole
from transformers import AutoModelForCausalLM, BloomConfig

from echoatt_exporter import EchoAttConfig, EchoAttForCausalLM, SharingPlan, share_attention
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.families import FAMILIES
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]


def test_a_plan_that_does_not_fit_leaves_the_teacher_alone(
    tiny_model: Models, tokens: torch.Tensor
) -> None:
    teacher = tiny_model("gemma2")  # sliding, full, sliding, full, …
    before, names = teacher(tokens).logits, set(teacher.state_dict())
    with pytest.raises(PlanError) as caught:
        share_attention(teacher, SharingPlan((0, 0, 0, 3, 2, 7)))
    for fault in (
        "layer 1 (full attention) uses layer 0 (sliding attention)",
        "layer 4 uses layer 2, which is itself a follower",
        "layer 5 uses layer 7, which does not exist",
    ):
        assert fault in str(caught.value)
    with pytest.raises(PlanError, match=whole("the plan has 3 layers and the model 6")):
        share_attention(teacher, SharingPlan((0, 1, 1)))
    assert set(teacher.state_dict()) == names
    assert torch.equal(teacher(tokens).logits, before)


def test_another_family_is_refused_with_the_list_of_supported_ones() -> None:
    config = BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=11)
    with pytest.raises(UnsupportedModelError) as caught:
        share_attention(AutoModelForCausalLM.from_config(config), SharingPlan((0,)))
    assert "model type 'bloom' is not supported" in str(caught.value)
    assert ", ".join(sorted(FAMILIES)) in str(caught.value)
    with pytest.raises(ValueError, match="the student's configuration has no layout"):
        EchoAttForCausalLM(EchoAttConfig(text_config=config, sources=[0]))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "short_factor": [1.0] * 6,
            "long_factor": [2.0] * 6,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_rotary_scaling_that_depends_on_the_length_is_refused(
    rope: dict[str, Any], tiny_model: Models
) -> None:
    config = tiny_model("llama", rope_parameters=rope).config
    with pytest.raises(UnsupportedModelError, match=f"rope_type '{rope['rope_type']}' changes"):
        architecture_of(config)


def test_bidirectional_attention_is_refused(tiny_model: Models) -> None:
    config = tiny_model("gemma3_text", use_bidirectional_attention=True).config
    with pytest.raises(UnsupportedModelError, match="bidirectional attention is not supported"):
        architecture_of(config)


def test_other_layer_types_are_refused(tiny_model: Models) -> None:
    config = tiny_model("qwen3").config
    config.layer_types = ["full_attention"] * 5 + ["linear_attention"]
    with pytest.raises(UnsupportedModelError, match="layers of type linear_attention"):
        architecture_of(config)


@pytest.mark.parametrize("training", [True, False])
def test_the_student_keeps_the_teachers_state(
    training: bool, tiny_model: Models, plan_for: Callable[[str], SharingPlan]
) -> None:
    teacher = tiny_model("phi3").to(torch.bfloat16).train(training)
    for parameter in teacher.model.layers[2].parameters():
        parameter.requires_grad_(False)
    values = teacher.model.layers[2].self_attn.qkv_proj.weight.detach()[-16:].clone()
    embeddings, settings = teacher.get_input_embeddings(), teacher.generation_config
    student = share_attention(teacher, plan_for("phi3"))
    assert student.dtype == torch.bfloat16
    assert student.config.dtype == torch.bfloat16
    assert all(module.training is training for module in student.modules())
    assert student.generation_config is settings
    assert student.get_input_embeddings() is embeddings
    follower = student.decoder.model.layers[2].self_attn
    assert torch.equal(follower.v_proj.weight, values)
    assert not follower.v_proj.weight.requires_grad
    # The fused matrix is let go: the values do not live in its storage
    assert follower.v_proj.weight.untyped_storage().nbytes() == values.nbytes
