"""SmolLM3: Llama with some layers that have no rotary embedding."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="smollm3")
