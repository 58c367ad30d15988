"""What a family's file in `tests/families` says of its tiny models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

VOCAB_SIZE = 61
# Shorter than any sequence in the tests
SLIDING_WINDOW = 5
SLIDING, FULL = "sliding_attention", "full_attention"

# 4 heads of 12 are wider than the hidden size, and each pair of them shares keys and values
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

ALTERNATING = {
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "sliding_window": SLIDING_WINDOW,
}


@dataclass(frozen=True)
class TinyModel:
    """A tiny model's family, config fields and sharing plan.

    Attributes:
        family: The model type.
        sources: A plan with at least 40 % followers that respects the layer kinds.
        fields: What differs from `COMMON`.
        unknown: The fields of `COMMON` that the family's configuration does not know.
        biased: Whether queries and keys have biases.
        norms: Whether queries and keys have norms: one for each head, or one over all heads.
        exported_layers: How many of its layers are exported where only the first ones are.
    """

    family: str
    sources: tuple[int, ...] = (0, 1, 1, 1, 4, 4)
    fields: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    biased: bool = False
    norms: Literal["none", "head", "all"] = "none"
    exported_layers: int = 4

    @property
    def grouped(self) -> bool:
        """Whether query heads can share keys and values."""
        return "num_key_value_heads" not in self.unknown
