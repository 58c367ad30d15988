"""Teacher and sharing plan to student."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.families import family_of
from echoatt_exporter.share.align_heads import reorder_heads
from echoatt_exporter.share.configuration_echoatt import EchoAttConfig
from echoatt_exporter.share.modeling_echoatt import ATTENTION_NAME, EchoAttForCausalLM
from echoatt_runtime.contract import SharingPlan


def share_attention(teacher: PreTrainedModel, plan: SharingPlan) -> EchoAttForCausalLM:
    """Apply a sharing plan to a loaded decoder (EchoAtt, arXiv 2409.14595, "Copy").

    A follower layer keeps the teacher's value and output projections and loses its query and key
    projections with their biases and norms; everything else is the teacher's. Where the plan orders
    a follower's heads, the order is folded into these two projections. No weight is copied (but for
    those, and for values cut out of a fused projection): the teacher's modules move into the
    student, and the teacher must not be used afterwards. `copy.deepcopy` it first to keep it.

    Args:
        teacher: A Hugging Face model for causal LM of a supported family.
        plan: One source per layer, and the followers' head orders.

    Returns:
        The student, in the teacher's dtype, device and training mode.

    Raises:
        UnsupportedModelError: The teacher's family is not supported.
        PlanError: The plan does not fit; names every fault at once.
    """
    text_config = teacher.config
    architecture_of(text_config).validate_plan(plan)
    for layer in plan.followers:
        if order := plan.head_order(layer):
            reorder_heads(teacher, layer, order)
    family = family_of(text_config)
    family.attention_kinds.forget_unread(text_config)
    layers = family.layers_of(teacher)
    for layer in plan.followers:
        attention = family.attention_of(layers[layer])
        follower = family.follower_of(attention, text_config)
        setattr(layers[layer], family.attention, follower.train(attention.training))
    teacher.set_attn_implementation(ATTENTION_NAME)
    config = EchoAttConfig(
        text_config=text_config,
        sources=list(plan.sources),
        layout=family.student_layout(text_config),
    )
    config.dtype = teacher.dtype
    with torch.device("meta"):
        student = EchoAttForCausalLM(config)
    student.decoder = teacher
    student.generation_config = teacher.generation_config
    student.train(teacher.training)
    return student
