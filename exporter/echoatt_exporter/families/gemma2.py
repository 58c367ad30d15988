"""Gemma 2: sliding and full layers by turns, capped scores and logits."""

from echoatt_exporter.families.attention_kinds import BY_LAYER_TYPE
from echoatt_exporter.families.base import REFUSALS, Family
from echoatt_exporter.families.gemma_encoders import refuse_gemma_encoder

FAMILY = Family(
    model_type="gemma2",
    attention_kinds=BY_LAYER_TYPE,
    norm_base=1.0,
    refusals=(refuse_gemma_encoder, *REFUSALS),
)
