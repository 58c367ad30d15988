"""What EchoAtt needs to know of a decoder, read from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from optimum.utils import NormalizedConfigManager
from optimum.utils.normalized_config import NormalizedTextConfig, NormalizedTextConfigWithGQA
from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.share.modeling_echoatt import FAMILIES
from echoatt_runtime.contract import SharingPlan

LayerKind = Literal["full", "sliding"]

# Rotary variants whose frequencies depend on the length of the running sequence. A graph traced
# once would freeze them at the traced length and be silently wrong at every other.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_KIND_OF_LAYER_TYPE: dict[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
}


@dataclass(frozen=True, slots=True)
class DecoderArchitecture:
    """A decoder's shape, in the words of the graph contract.

    Attributes:
        family: The Hugging Face `model_type`.
        layer_kinds: Attention kind of each layer.
        sliding_window: Tokens a sliding layer sees, itself included; None without such layers.
        num_query_heads: Query heads of every layer.
        num_kv_heads: Key/value heads of every layer.
        head_dim: Elements per head.
        vocab_size: Rows of the LM head.
        context_length: The most positions the checkpoint was made for.
    """

    family: str
    layer_kinds: tuple[LayerKind, ...]
    sliding_window: int | None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_kinds)

    def validate_plan(self, plan: SharingPlan) -> None:
        """Check that `plan` fits this decoder.

        Raises:
            PlanError: Names every fault at once.
        """
        count = self.num_layers
        plan.validate(
            self.layer_kinds, (self.num_query_heads,) * count, (self.num_kv_heads,) * count
        )


def specification_fields(architecture: DecoderArchitecture) -> dict[str, Any]:
    """What a bundle's specification takes over from the decoder."""
    count = architecture.num_layers
    return {
        "family": architecture.family,
        "layer_kinds": architecture.layer_kinds,
        "sliding_window": architecture.sliding_window,
        "query_heads": (architecture.num_query_heads,) * count,
        "kv_heads": (architecture.num_kv_heads,) * count,
        "head_dims": (architecture.head_dim,) * count,
        "vocab_size": architecture.vocab_size,
        "context_length": architecture.context_length,
    }


def _normalized(config: PreTrainedConfig) -> Any:
    """Optimum's view of the config, with one set of field names across families."""
    family = config.model_type
    if family in NormalizedConfigManager._conf:
        return NormalizedConfigManager.get_normalized_config_class(family)(config)
    # optimum 2.3 does not list the later Gemmas
    grouped = hasattr(config, "num_key_value_heads")
    return (NormalizedTextConfigWithGQA if grouped else NormalizedTextConfig)(config)


def _layer_kinds(config: PreTrainedConfig, num_layers: int) -> tuple[LayerKind, ...]:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = getattr(config, "sliding_window", None)
        layer_types = ["full_attention" if window is None else "sliding_attention"] * num_layers
    unknown = sorted(set(layer_types) - set(_KIND_OF_LAYER_TYPE))
    if unknown:
        raise UnsupportedModelError(
            f"layers of type {', '.join(unknown)} are not supported; EchoAtt shares full and"
            " sliding attention"
        )
    return tuple(_KIND_OF_LAYER_TYPE[layer_type] for layer_type in layer_types)


def _check_rope(config: PreTrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 has one set of parameters per layer type
    sets = [rope] if "rope_type" in rope else [p for p in rope.values() if isinstance(p, dict)]
    for parameters in sets:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"rope_type {parameters['rope_type']!r} changes its frequencies with the length of"
                " the text, which a fixed graph cannot; use a checkpoint with default, linear,"
                " llama3 or yarn scaling"
            )


def architecture_of(config: PreTrainedConfig) -> DecoderArchitecture:
    """Describe the decoder that `config` belongs to.

    Args:
        config: A teacher's configuration; of a student, its `text_config`.

    Raises:
        UnsupportedModelError: Another family, or a feature that cannot be shared or exported.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {family!r} is not supported; EchoAtt knows {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("bidirectional attention is not supported: not a decoder")
    _check_rope(config)
    normalized = _normalized(config)
    heads = normalized.num_attention_heads
    num_layers = normalized.num_layers
    kinds = _layer_kinds(config, num_layers)
    return DecoderArchitecture(
        family=family,
        layer_kinds=kinds,
        sliding_window=config.sliding_window if "sliding" in kinds else None,
        num_query_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or normalized.hidden_size // heads,
        vocab_size=normalized.vocab_size,
        context_length=config.max_position_embeddings,
    )
