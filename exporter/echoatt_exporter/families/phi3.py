"""Phi-3: Llama with packed projections."""

from echoatt_exporter.families.attention_kinds import BY_WINDOW
from echoatt_exporter.families.base import Family
from echoatt_exporter.families.head_layouts import BlockedHeads

FAMILY = Family(
    model_type="phi3",
    heads=BlockedHeads("qkv_proj"),
    attention_kinds=BY_WINDOW,
    gated=("mlp.gate_up_proj", "mlp.down_proj"),
)
