"""Each layer's attention kind, by the keys of the configuration that a family's code reads.

A key that it does not read changes nothing, whatever the configuration says: transformers computes
full attention for a Llama with `sliding_window`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError

LayerKind = Literal["full", "sliding"]

# What transformers' caches read, of every family
_CACHE_KEYS = ("attention_chunk_size", "layer_types", "sliding_window")
_KIND_OF_LAYER_TYPE: dict[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
}


@dataclass(frozen=True)
class AttentionKinds:
    """How a family's layers attend.

    Attributes:
        of: The kind of every layer, by the configuration.
        keys: The keys that say it, as far as transformers' caches read them too.
    """

    of: Callable[[PreTrainedConfig], tuple[LayerKind, ...]]
    keys: tuple[str, ...] = ()

    def forget_unread(self, config: PreTrainedConfig) -> None:
        """Take from a configuration, in place, the keys that the family's code does not read.

        Its caches would, and keep a window of what is attended to in full.
        """
        for key in _CACHE_KEYS:
            if key not in self.keys and key in vars(config):
                delattr(config, key)


def _all_full(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    return _repeat("full", config)


def _by_window(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    return _repeat("full" if config.sliding_window is None else "sliding", config)


def _repeat(kind: LayerKind, config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    return (kind,) * int(config.num_hidden_layers)


def _by_layer_type(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    unknown = sorted(set(config.layer_types) - set(_KIND_OF_LAYER_TYPE))
    if unknown:
        raise UnsupportedModelError(
            f"layers of type {', '.join(unknown)} are not supported; EchoAtt shares full and"
            " sliding attention"
        )
    kinds = tuple(_KIND_OF_LAYER_TYPE[layer_type] for layer_type in config.layer_types)
    if "sliding" in kinds and config.sliding_window is None:
        raise UnsupportedModelError(
            "its layer_types name sliding attention and no sliding_window is in use, which"
            " transformers cannot compute either; correct config.json"
        )
    return kinds


ALL_FULL = AttentionKinds(_all_full)
"""Every layer attends to all tokens."""

BY_WINDOW = AttentionKinds(_by_window, ("sliding_window",))
"""Every layer slides where there is a window; none does where there is none."""

BY_LAYER_TYPE = AttentionKinds(_by_layer_type, ("layer_types", "sliding_window"))
"""Each layer as `layer_types` says.

`of` raises UnsupportedModelError for a type that is neither full nor sliding attention, and for a
sliding one without a window.
"""
