"""What EchoAtt must know of a family of decoders, with the answers of most of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.families.attention_kinds import ALL_FULL, AttentionKinds
from echoatt_exporter.families.head_layouts import (
    HeadLayout,
    LayerHeads,
    SeparateHeads,
    query_elements,
)
from echoatt_exporter.families.projections import take_inputs
from echoatt_exporter.families.rotary import context_under_rotary, refuse_length_dependent_rope
from echoatt_exporter.share.modeling_echoatt import FollowerAttention


def same_heads_in_every_layer(config: PreTrainedConfig) -> tuple[LayerHeads, ...]:
    """Each layer's heads, where the configuration gives one number for all of them."""
    query, num_layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    heads = LayerHeads(
        query=query,
        key_value=getattr(config, "num_key_value_heads", None) or query,
        size=getattr(config, "head_dim", None) or config.hidden_size // query,
    )
    return (heads,) * num_layers


def hidden_size_over_heads(config: PreTrainedConfig) -> tuple[LayerHeads, ...]:
    """Each layer's heads where every head has keys of its own and they share the hidden size.

    Such families read neither `head_dim` nor `num_key_value_heads`.
    """
    heads, num_layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    return (LayerHeads(heads, heads, config.hidden_size // heads),) * num_layers


def refuse_bidirectional_attention(config: PreTrainedConfig) -> None:
    """Refuse an encoder made of a decoder's layers, which any family can be.

    Raises:
        UnsupportedModelError: The configuration asks for it.
    """
    if not getattr(config, "is_causal", True):
        raise UnsupportedModelError("bidirectional attention is not supported: not a decoder")


REFUSALS = (refuse_bidirectional_attention, refuse_length_dependent_rope)
"""What is refused of most families."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders, as transformers builds and configures it.

    The defaults are those of Llama and what is built like it.

    Attributes:
        model_type: What transformers calls it.
        layers: Path of the list of decoder layers, below the model for causal LM.
        attention: Name of the attention module in a layer.
        output: Name of the output projection in the attention.
        heads: How the attention stores its queries, keys and values.
        layer_heads: The heads of every layer, by the configuration.
        attention_kinds: How its layers attend.
        context_length: The most positions that a decoder was made for, by the configuration.
        gated: Names in a layer of the projection whose last outputs are multiplied with a gate, and
            of the one that reads the product; None where there is no gate.
        norm_base: What norms add to their weight.
        dropout: Name of the configuration's field for dropout of attention probabilities.
        learned_positions: Whether positions are looked up in a table, which has no row for a
            position behind the context length.
        refusals: Each raises UnsupportedModelError for a configuration with what cannot be shared
            or exported.
        relatives: By model type, why a relative that is taken for this family is not supported.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    heads: HeadLayout = field(default_factory=SeparateHeads)
    layer_heads: Callable[[PreTrainedConfig], tuple[LayerHeads, ...]] = same_heads_in_every_layer
    attention_kinds: AttentionKinds = ALL_FULL
    context_length: Callable[[PreTrainedConfig], int] = context_under_rotary
    gated: tuple[str, str] | None = ("mlp.up_proj", "mlp.down_proj")
    norm_base: float = 0.0
    dropout: str = "attention_dropout"
    learned_positions: bool = False
    refusals: tuple[Callable[[PreTrainedConfig], None], ...] = REFUSALS
    relatives: Mapping[str, str] = field(default_factory=dict)

    def layers_of(self, decoder: PreTrainedModel) -> nn.ModuleList:
        """A decoder's list of layers."""
        layers = decoder.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)  # noqa: S101 - so it is in every family
        return layers

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """A layer's attention module, a follower's too."""
        return layer.get_submodule(self.attention)

    def output_of(self, attention: nn.Module) -> Any:
        """An attention module's output projection, a follower's too."""
        if isinstance(attention, FollowerAttention):
            return attention.o_proj
        return attention.get_submodule(self.output)

    def follower_of(self, attention: nn.Module, config: PreTrainedConfig) -> FollowerAttention:
        """The follower that keeps the values and the output projection of an attention module.

        Args:
            attention: A teacher's; its modules go into the follower as they are, but for values
                that are cut out of a packed projection.
            config: The teacher's configuration.
        """
        layer: Any = attention.layer_idx
        heads = self.layer_heads(config)[layer]
        return FollowerAttention(
            layer_idx=layer,
            num_heads=heads.query,
            head_dim=heads.size,
            v_proj=self.heads.cut_values(attention, heads),
            o_proj=self.output_of(attention),
            attention_dropout=float(getattr(config, self.dropout)),
        )

    def reorder_heads(
        self, attention: nn.Module, config: PreTrainedConfig, order: Sequence[int]
    ) -> None:
        """Permute the heads of an attention module in place, so that it computes the same.

        Args:
            attention: A teacher's.
            config: The teacher's configuration.
            order: The query head that is put at each position; groups stay whole.
        """
        layer: Any = attention.layer_idx
        heads = self.layer_heads(config)[layer]
        self.heads.reorder(attention, heads, order)
        take_inputs(self.output_of(attention), query_elements(heads, order))

    def student_layout(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What a student's class must know of its teacher; see `EchoAttConfig.layout`."""
        heads = self.layer_heads(config)
        return {
            "layers": self.layers,
            "attention": self.attention,
            "output": self.output,
            "values": self.heads.values,
            "dropout": self.dropout,
            "query_heads": [layer.query for layer in heads],
            "kv_heads": [layer.key_value for layer in heads],
            "head_dims": [layer.size for layer in heads],
        }
