"""Llama, and the many checkpoints that are saved as one."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="llama")
