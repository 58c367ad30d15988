"""What EchoAtt needs to know of a decoder, read from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from echoatt_exporter.families import LayerKind, family_of
from echoatt_runtime.contract import SharingPlan


@dataclass(frozen=True, slots=True)
class DecoderArchitecture:
    """A decoder's shape, in the words of the graph contract.

    Attributes:
        family: The Hugging Face `model_type`.
        layer_kinds: Attention kind of each layer.
        sliding_window: Tokens a sliding layer sees, itself included; None without such layers.
        query_heads: Query heads of each layer.
        kv_heads: Key/value heads of each layer.
        head_dims: Elements per head, of each layer.
        vocab_size: Rows of the LM head.
        context_length: The most positions the checkpoint was made for.
    """

    family: str
    layer_kinds: tuple[LayerKind, ...]
    sliding_window: int | None
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    vocab_size: int
    context_length: int

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_kinds)

    @property
    def sharing_kinds(self) -> tuple[tuple[LayerKind, int], ...]:
        """Of each layer what must be equal in its source: attention kind and query heads."""
        return tuple(zip(self.layer_kinds, self.query_heads, strict=True))

    def validate_plan(self, plan: SharingPlan) -> None:
        """Check that `plan` fits this decoder.

        Raises:
            PlanError: Names every fault at once.
        """
        plan.validate(self.layer_kinds, self.query_heads, self.kv_heads)


def specification_fields(architecture: DecoderArchitecture) -> dict[str, Any]:
    """What a bundle's specification takes over from the decoder."""
    return {field.name: getattr(architecture, field.name) for field in fields(architecture)}


def architecture_of(config: PreTrainedConfig) -> DecoderArchitecture:
    """Describe the decoder that `config` belongs to.

    Args:
        config: A teacher's configuration; of a student, its `text_config`.

    Raises:
        UnsupportedModelError: Another family, or a feature that cannot be shared or exported.
    """
    family = family_of(config)
    for refuse in family.refusals:
        refuse(config)
    kinds, heads = family.attention_kinds.of(config), family.layer_heads(config)
    return DecoderArchitecture(
        family=family.model_type,
        layer_kinds=kinds,
        sliding_window=config.sliding_window if "sliding" in kinds else None,
        query_heads=tuple(layer.query for layer in heads),
        kv_heads=tuple(layer.key_value for layer in heads),
        head_dims=tuple(layer.size for layer in heads),
        vocab_size=config.vocab_size,
        context_length=family.context_length(config),
    )
