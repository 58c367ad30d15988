"""SmolLM3: Llama with some layers that have no rotary embedding."""

from echoatt_exporter.families.attention_kinds import BY_LAYER_TYPE
from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="smollm3", attention_kinds=BY_LAYER_TYPE)
