"""Qwen2: Llama with biased queries, keys and values."""

from echoatt_exporter.families.attention_kinds import BY_LAYER_TYPE
from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="qwen2", attention_kinds=BY_LAYER_TYPE)
