"""Gemma 3, text only: five sliding layers to a full one, each kind with its own rotary base."""

from echoatt_exporter.families.attention_kinds import BY_LAYER_TYPE
from echoatt_exporter.families.base import REFUSALS, Family
from echoatt_exporter.families.gemma_encoders import refuse_gemma_encoder

FAMILY = Family(
    model_type="gemma3_text",
    attention_kinds=BY_LAYER_TYPE,
    norm_base=1.0,
    refusals=(refuse_gemma_encoder, *REFUSALS),
    relatives={
        "gemma3": "a multimodal Gemma 3; only text checkpoints (model type gemma3_text) are"
        " supported"
    },
)
