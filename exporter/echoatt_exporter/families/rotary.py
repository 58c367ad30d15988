"""What rotary embeddings mean for a decoder: how far its positions reach, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError

# Rotary variants whose frequencies depend on the length of the running sequence. A graph traced
# once would freeze them at the traced length and be silently wrong at every other.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_STRETCHED_BY_FACTOR = ("linear", "yarn")
_NO_LENGTH = 1 << 31


def context_under_rotary(config: PreTrainedConfig) -> int:
    """The most positions that a decoder was made for, its scaled rotary embeddings included.

    `max_position_embeddings` means two things in published configurations: the length before
    scaling, which transformers asks for and Qwen2.5 has, or the length after it, as in Llama 3.1
    and DeepSeek. `original_max_position_embeddings` tells them apart, where it is given.
    """
    stated: int = config.max_position_embeddings
    # Where layer kinds have embeddings of their own, such as Gemma 3's, the shortest counts
    return min((_reach(parameters, stated) for parameters in _rotary_sets(config)), default=stated)


def refuse_length_dependent_rope(config: PreTrainedConfig) -> None:
    """Refuse rotary angles that change with the length of the text.

    Raises:
        UnsupportedModelError: The configuration scales them so.
    """
    for parameters in _rotary_sets(config):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT:
            raise UnsupportedModelError(
                f"rope_type {parameters['rope_type']!r} changes its frequencies with the length of"
                " the text, which a fixed graph cannot; use a checkpoint with default, linear,"
                " llama3 or yarn scaling"
            )


def _rotary_sets(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """A configuration's rotary parameters: one set, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [p for p in rope.values() if isinstance(p, dict)]


def _reach(parameters: Mapping[str, Any], stated: int) -> int:
    """How many positions one set of parameters was made for."""
    kind = parameters.get("rope_type")
    original = _sensible(parameters.get("original_max_position_embeddings"), stated)
    stretched = int(original * _sensible(parameters.get("factor"), 1))
    if kind in _STRETCHED_BY_FACTOR:
        return max(stated, stretched)
    # Llama's factor is none of lengths: Llama 3.2 has 32, 8,192 positions before and 131,072 after
    return stretched if kind == "llama3" and stated <= original else stated


def _sensible(value: Any, otherwise: float) -> float:
    """A number as configurations have them; transformers lets others pass until it computes."""
    return value if isinstance(value, int | float) and 1 <= value < _NO_LENGTH else otherwise
