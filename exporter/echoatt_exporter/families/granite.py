"""Granite: Llama with multipliers of its own."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="granite")
