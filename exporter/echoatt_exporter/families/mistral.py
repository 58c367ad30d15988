"""Mistral: Llama, with a sliding window in every layer or in none."""

from echoatt_exporter.families.attention_kinds import BY_WINDOW
from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="mistral", attention_kinds=BY_WINDOW)
