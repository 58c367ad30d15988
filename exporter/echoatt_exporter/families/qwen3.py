"""Qwen3: Llama with a norm for each head of queries and keys."""

from echoatt_exporter.families.attention_kinds import BY_LAYER_TYPE
from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="qwen3", attention_kinds=BY_LAYER_TYPE)
