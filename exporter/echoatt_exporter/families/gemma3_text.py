"""Gemma 3, text only: five sliding layers to a full one, each kind with its own rotary base."""

from echoatt_exporter.families.base import (
    Family,
    refuse_bidirectional_attention,
    refuse_length_dependent_rope,
)

FAMILY = Family(
    model_type="gemma3_text",
    refusals=(refuse_bidirectional_attention, refuse_length_dependent_rope),
    relatives={
        "gemma3": "a multimodal Gemma 3; only text checkpoints (model type gemma3_text) are"
        " supported"
    },
)
