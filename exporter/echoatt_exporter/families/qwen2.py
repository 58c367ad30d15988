"""Qwen2: Llama with biased queries, keys and values."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="qwen2")
