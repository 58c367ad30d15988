"""The module that is traced: a student behind the graph contract's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from echoatt_exporter.families import family_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.trace.layer_kinds import LayerKinds
from echoatt_exporter.trace.markers import MarkedAttention, marked_layers
from echoatt_exporter.trace.plain_products import plain_products
from echoatt_exporter.trace.scatter_cache import ScatterCache
from echoatt_runtime.contract import Specification

_LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}


class DecoderGraph(nn.Module):
    """Computes logits and updated caches from tokens, lengths and caches, with nothing else inside.

    Positions, rotary angles and masks all come from `past_lengths`, so rows of different lengths
    need no padding on the left. Each attention kind's mask is computed once and used by all its
    layers.

    Attributes:
        decoder: The student's own decoder.
        caches: The templates' caches, in the specification's order.
    """

    def __init__(
        self, student: EchoAttForCausalLM, specification: Specification, kinds: LayerKinds
    ) -> None:
        """Wrap a student whose decoder runs the templates of `kinds` only."""
        super().__init__()
        self.decoder = student.decoder
        self._family = family_of(student.decoder.config)
        self.caches = [c for c in specification.caches if c.layer in kinds.templates]
        self._specification = specification
        self._kinds = kinds

    def forward(
        self,
        input_ids: torch.Tensor,
        past_lengths: torch.Tensor,
        logits_indices: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the decoder.

        Args:
            input_ids: Int64 [B, S].
            past_lengths: Int64 [B], valid tokens of each row.
            logits_indices: Int64 [B, n], the positions in this call whose logits are wanted.
            past: The templates' caches, in the specification's order and with its axes.

        Returns:
            Logits, float32 [B, n, V], and the updated caches in the same order.
        """
        cache = ScatterCache(self.caches, past, past_lengths)
        capacity = past[0].shape[self.caches[0].capacity_axis]
        positions = past_lengths[:, None] + torch.arange(input_ids.shape[1])[None]
        with (
            plain_products(self.decoder),
            _only_wanted_rows(self.decoder.get_output_embeddings(), logits_indices),
            marked_layers(self._family.layers_of(self.decoder), self._kinds.templates),
        ):
            logits = self.decoder(
                input_ids=input_ids,
                position_ids=self._position_ids(positions),
                attention_mask=self._masks(positions, capacity),
                past_key_values=cache,
                use_cache=True,
                shared_attention=MarkedAttention(self._kinds.sources),
            ).logits
        return logits.float(), cache.buffers

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions [B, S] for the decoder's embeddings.

        A short row's padding may lie behind the last position that a table has.
        """
        if not self._family.learned_positions:
            return positions
        return positions.clamp(max=self._specification.context_length - 1)

    def _masks(self, positions: torch.Tensor, capacity: int) -> Any:
        """Additive masks [B, 1, S, T]; a tensor, or by layer type for families that mix kinds."""
        kinds = sorted(set(self._specification.layer_kinds))
        slots = torch.arange(capacity)[None, None]
        causal = slots <= positions[:, :, None]
        masks: dict[str, torch.Tensor] = {}
        for kind in kinds:
            visible = causal
            if kind == "sliding":
                assert self._specification.sliding_window is not None  # noqa: S101 - it has the kind
                visible = causal & (
                    slots > positions[:, :, None] - self._specification.sliding_window
                )
            hidden = torch.finfo(self.decoder.dtype).min
            mask = torch.where(visible, 0.0, hidden).to(self.decoder.dtype)
            masks[_LAYER_TYPES[kind]] = mask[:, None]
        if getattr(self.decoder.config, "layer_types", None) is None:
            return masks[_LAYER_TYPES[kinds[0]]]
        # Such a family looks up both kinds, used or not
        return dict.fromkeys(_LAYER_TYPES.values(), next(iter(masks.values()))) | masks


@contextmanager
def _only_wanted_rows(lm_head: nn.Module, logits_indices: torch.Tensor) -> Iterator[None]:
    """Let `lm_head` see only the rows whose logits are wanted.

    Done in front of the head and not behind the decoder, because some families scale or cap the
    logits afterwards.
    """

    def gather(_: nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        hidden = arguments[0]
        index = logits_indices[:, :, None].expand(-1, -1, hidden.shape[-1])
        return torch.gather(hidden, 1, index)

    hook = lm_head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
