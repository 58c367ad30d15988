"""Mistral: Llama, with a sliding window in every layer or in none."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="mistral")
