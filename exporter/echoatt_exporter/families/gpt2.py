"""GPT-2: learned positions, and packed projections stored as [in, out]."""

from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.families.base import (
    Family,
    hidden_size_over_heads,
    refuse_bidirectional_attention,
)
from echoatt_exporter.families.head_layouts import BlockedHeads


def _refuse_cross_attention(config: PreTrainedConfig) -> None:
    if config.add_cross_attention:
        raise UnsupportedModelError(
            "a GPT-2 with cross-attention is the decoder of another model's encoder; only those"
            " without are supported"
        )


def _table_rows(config: PreTrainedConfig) -> int:
    return int(config.max_position_embeddings)


FAMILY = Family(
    model_type="gpt2",
    layers="transformer.h",
    attention="attn",
    output="c_proj",
    heads=BlockedHeads("c_attn"),
    layer_heads=hidden_size_over_heads,
    context_length=_table_rows,
    gated=None,
    dropout="attn_pdrop",
    learned_positions=True,
    refusals=(_refuse_cross_attention, refuse_bidirectional_attention),
)
