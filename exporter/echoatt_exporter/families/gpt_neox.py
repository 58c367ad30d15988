"""GPT-NeoX (Pythia): queries, keys and values packed head by head."""

from echoatt_exporter.families.base import Family, hidden_size_over_heads
from echoatt_exporter.families.head_layouts import InterleavedHeads

FAMILY = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    output="dense",
    heads=InterleavedHeads("query_key_value"),
    layer_heads=hidden_size_over_heads,
    gated=None,
)
