"""Gemma 2: sliding and full layers by turns, capped scores and logits."""

from echoatt_exporter.families.base import (
    Family,
    refuse_bidirectional_attention,
    refuse_length_dependent_rope,
)

FAMILY = Family(
    model_type="gemma2",
    refusals=(refuse_bidirectional_attention, refuse_length_dependent_rope),
)
