"""A decoder whose follower layers reuse an earlier layer's attention probabilities.

The student keeps the teacher's own module tree, with the attention of each follower layer replaced
by one that projects values only. Where that is, and of what shape, its configuration's `layout`
says: this file knows no family of models. Probabilities travel from a source
layer to its followers in one object made for each forward call and handed down as a keyword
argument, so that nothing is kept on a module: replicas, threads, recomputed layers and several
models in one process cannot mix anything up.

The method is EchoAtt's (arXiv 2409.14595). This file and `configuration_echoatt.py` import torch
and transformers only, so that they can be saved beside a checkpoint and loaded without EchoAtt.

Shapes in names: B batch, S new tokens, T tokens attended to, H query heads, N key/value heads,
G = H / N query heads a group, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_echoatt import EchoAttConfig

ATTENTION_NAME = "echoatt"


class SharedAttention(Protocol):
    """One forward call's attention: computes a source's probabilities and lends them on."""

    def attend(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BNTD: torch.Tensor,
        value_BNTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention output [B, S, H, D] of the source layer `module.layer_idx`."""

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """Attention output [B, S, H, D] of the follower layer `module.layer_idx`."""


@dataclass
class MaterializedAttention:
    """Shared attention that keeps each needed source's probabilities, as the paper does.

    Attributes:
        sources: The sharing plan.
        probabilities: By source layer, [B, N, G·S, T], before dropout; only of sources that some
            follower names.
    """

    sources: Sequence[int]
    probabilities: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lending = {s for layer, s in enumerate(self.sources) if layer != s}

    def attend(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BNTD: torch.Tensor,
        value_BNTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """See `SharedAttention.attend`; softmax is computed in float32."""
        B, H, S, D = query_BHSD.shape
        N, T = key_BNTD.shape[1], key_BNTD.shape[2]
        # Query heads of one group lie side by side, so that grouping them is a view and the keys
        # and values need no repetition.
        query = query_BHSD.reshape(B, N, H // N * S, D)
        scores = torch.matmul(query, key_BNTD.transpose(2, 3)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.reshape(B, H, S, T)
        if mask is not None:
            scores = scores + mask
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query_BHSD.dtype)
        probabilities = probabilities.reshape(B, N, H // N * S, T)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in self._lending:
            self.lend(layer, probabilities)
        return _context(probabilities, value_BNTD, S, dropout)

    def lend(self, layer: int, probabilities: torch.Tensor) -> None:
        """Keep a source's probabilities [B, N, G·S, T] for its followers."""
        self.probabilities[layer] = probabilities

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`."""
        probabilities = self.probabilities[self.sources[module.layer_idx]]
        queries = probabilities.shape[1] * probabilities.shape[2]
        dropout = module.attention_dropout if module.training else 0.0
        return _context(probabilities, value_BNTD, queries // module.num_heads, dropout)


def _context(
    probabilities: torch.Tensor, value_BNTD: torch.Tensor, S: int, dropout: float
) -> torch.Tensor:
    """Probabilities [B, N, G·S, T] times values, as [B, S, H, D]."""
    if dropout:
        probabilities = nn.functional.dropout(probabilities, p=dropout)
    context = torch.matmul(probabilities, value_BNTD)
    B, _, _, D = context.shape
    return context.reshape(B, -1, S, D).transpose(1, 2)


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    shared_attention: SharedAttention,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls for every source layer of a student."""
    output = shared_attention.attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return output, None


AttentionInterface.register(ATTENTION_NAME, _attention_function)
AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)


class FollowerAttention(nn.Module):
    """The attention of a follower layer: values and output projection, no queries, no keys."""

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        head_dim: int,
        v_proj: nn.Linear,
        o_proj: nn.Module,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attention_dropout = attention_dropout
        self.v_proj = v_proj
        self.o_proj = o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        shared_attention: SharedAttention,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend with the source's probabilities.

        Args:
            hidden_states: [B, S, E].
            shared_attention: This forward call's probabilities.
            past_key_values: The cache; its layer for this module holds values only.
            layer_past: The same under an older name.

        Returns:
            The output [B, S, E], and None in the place of attention weights.
        """
        B, S, _ = hidden_states.shape
        value = self.v_proj(hidden_states).view(B, S, -1, self.head_dim).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            no_key = value.new_empty((*value.shape[:-1], 0))
            _, value = cache.update(no_key, value, self.layer_idx)
        context = shared_attention.follow(self, value)
        return self.o_proj(context.reshape(B, S, -1)), None


def make_followers(decoder: PreTrainedModel, config: EchoAttConfig) -> None:
    """Turn the follower layers of a new `decoder` into value-only ones with new weights, in place.

    Args:
        decoder: Made from the teacher's configuration, without a teacher's weights.
        config: The student's.
    """
    layout, sources, text_config = config.layout, config.sources, config.get_text_config()
    assert layout is not None  # noqa: S101 - the caller has looked
    assert sources is not None  # noqa: S101 - the configuration fills it in
    layers = cast(nn.ModuleList, decoder.get_submodule(layout["layers"]))
    for index, layer in enumerate(layers):
        if sources[index] == index:
            continue
        attention = layer.get_submodule(layout["attention"])
        # Of this projection, which may be of queries and keys too, the value projection is a part
        values: Any = attention.get_submodule(layout["values"])
        head_dim = layout["head_dims"][index]
        v_proj = nn.Linear(
            text_config.hidden_size,
            layout["kv_heads"][index] * head_dim,
            bias=values.bias is not None,
            dtype=values.weight.dtype,
        )
        follower = FollowerAttention(
            layer_idx=index,
            num_heads=layout["query_heads"][index],
            head_dim=head_dim,
            v_proj=v_proj,
            o_proj=attention.get_submodule(layout["output"]),
            attention_dropout=float(getattr(text_config, layout["dropout"])),
        )
        setattr(layer, layout["attention"], follower.train(attention.training))


class _ValueOnlyLayer(DynamicLayer):
    """A follower's cache: values; its keys are tensors of head size 0."""

    def get_seq_length(self) -> int:
        """Tokens held; the parent class would count the keys' elements."""
        return 0 if self.values is None or self.values.dim() < 4 else int(self.values.shape[-2])


class _ValueOnlySlidingLayer(DynamicSlidingWindowLayer):
    """A follower's cache in a sliding window layer; it counts tokens, whatever the keys' size."""


def keep_no_follower_keys(cache: Cache, sources: Sequence[int]) -> None:
    """Make `cache` hold values only in follower layers, in place.

    Raises:
        ValueError: A cache of another kind than dynamic, or one that another model filled.
    """
    layers = cache.layers
    while len(layers) < len(sources):  # a cache made without a configuration grows as it goes
        layers.append(DynamicLayer())
    for index, source in enumerate(sources):
        layer: Any = layers[index]
        if index == source or isinstance(layer, _ValueOnlyLayer | _ValueOnlySlidingLayer):
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__}; an EchoAtt student runs"
                " with a DynamicCache (cache_implementation='dynamic')"
            )
        if layer.is_initialized:
            raise ValueError(
                f"layer {index} of the cache holds another model's keys; pass a new DynamicCache"
            )
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers[index] = _ValueOnlySlidingLayer(sliding_window=layer.sliding_window)
        else:
            layers[index] = _ValueOnlyLayer()  # type: ignore[no-untyped-call]


class EchoAttForCausalLM(PreTrainedModel, GenerationMixin):
    """A student: the teacher's decoder with a sharing plan applied.

    Attributes:
        decoder: The teacher's own model for causal LM, followers without query and key projections.
    """

    config_class = EchoAttConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    config: EchoAttConfig

    def __init__(self, config: EchoAttConfig) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        if config.layout is None:
            raise ValueError(
                "the student's configuration has no layout, as an older EchoAtt saved it; load it"
                " with echoatt_exporter.load_shared and save that"
            )
        self.decoder = AutoModelForCausalLM.from_config(
            text_config, attn_implementation=ATTENTION_NAME
        )
        make_followers(self.decoder, config)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def sources(self) -> list[int]:
        """The sharing plan."""
        assert self.config.sources is not None  # noqa: S101 - the configuration fills it in
        return self.config.sources

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and the rest of what the teacher's class returns; same arguments.

        Raises:
            ValueError: A cache that is not dynamic.
        """
        # Caching in training mode under checkpointing is switched off by the layers themselves
        if use_cache is None:
            use_cache = self.decoder.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.decoder.config)
        if past_key_values is not None:
            keep_no_follower_keys(past_key_values, self.sources)
        kwargs.setdefault("shared_attention", MaterializedAttention(self.sources))
        return self.decoder(  # type: ignore[no-any-return]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, but never reentrant.

        Raises:
            ValueError: `use_reentrant=True`, which cuts the gradient from a follower to its
                source's probabilities without a word.
        """
        chosen = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if chosen["use_reentrant"]:
            raise ValueError(
                "use_reentrant=True loses the followers' gradient to their source's attention"
                " probabilities; use use_reentrant=False"
            )
        super().activation_checkpointing_enable(chosen, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's LM head."""
        return self.decoder.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder's LM head."""
        self.decoder.set_output_embeddings(new_embeddings)
