"""Finds where channels can be scaled without changing what a model computes.

What a norm gives, the values of attention and the linear factor of a gated feed-forward reach the
products that read them channel by channel: dividing what is given and multiplying what reads it by
the same numbers cancels out.

C channels, K inputs of the products, N key/value heads, G query heads a group, D head size.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.families import Family, LayerHeads, family_of
from echoatt_exporter.families.projections import is_projection, weight_out_in
from echoatt_exporter.quantise.round_weights import has_shared_table, replace_weight
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM, FollowerAttention

_FEW_TOKENS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """Channels between one module and the products of one input.

    Attributes:
        producer: A norm or a projection.
        outputs: Which of its outputs they are, int64 [C].
        channels: Which channel each input of the products is, int64 [K].
        base: What a norm adds to its weight.
        consumers: The projections that read the channels.
    """

    producer: nn.Module
    outputs: torch.Tensor
    channels: torch.Tensor
    base: float = 0.0
    consumers: list[nn.Linear | Conv1D] = field(default_factory=list)

    def over_channels(self, values_K: torch.Tensor) -> torch.Tensor:
        """The sum of what inputs have, for each channel [C]."""
        return values_K.new_zeros(len(self.outputs)).index_add(0, self.channels, values_K)

    @torch.no_grad()
    def scale(self, factors_C: torch.Tensor) -> None:
        """Multiply what the consumers have for channels, and divide what the producer has."""
        factors_K = factors_C[self.channels]
        for consumer in self.consumers:
            replace_weight(consumer, weight_out_in(consumer) * factors_K)
        producer: Any = self.producer
        if is_projection(producer):
            weight_NK = weight_out_in(producer).clone()
            weight_NK[self.outputs] /= factors_C[:, None]
            replace_weight(producer, weight_NK)
        else:
            weight_C = (producer.weight + self.base) / factors_C - self.base
            producer.weight = nn.Parameter(weight_C, requires_grad=False)
        if getattr(producer, "bias", None) is not None:
            bias_N = producer.bias.clone()
            bias_N[self.outputs] /= factors_C
            producer.bias = nn.Parameter(bias_N, requires_grad=False)


def find_places(student: EchoAttForCausalLM) -> list[Place]:
    """Every place of a student, those first whose producer is another one's consumer.

    Args:
        student: On the CPU, in evaluation mode. A few tokens run through it.
    """
    config = student.config.get_text_config()
    family = family_of(config)
    places = []
    layers = family.layers_of(student.decoder)
    for layer, heads in zip(layers, family.layer_heads(config), strict=True):
        places.append(_values(family, layer, heads))
        if family.gated is not None:
            factor, reader = (layer.get_submodule(name) for name in family.gated)
            places.append(_product(factor, reader))
    return [*places, *_behind_norms(student, family)]


@torch.no_grad()
def _behind_norms(student: EchoAttForCausalLM, family: Family) -> list[Place]:
    """What norms give to projections and to nothing else that would show in a few tokens."""
    # By where they lie: what goes on may be a view. Kept alive, so that nothing else lies there.
    given: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    places: dict[nn.Module, Place] = {}

    def give(norm: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        given[output.data_ptr()] = norm, output

    def read(projection: Any, arguments: tuple[torch.Tensor]) -> None:
        norm, output = given.get(arguments[0].data_ptr(), (None, None))
        if norm is None or output is None or output.shape != arguments[0].shape:
            return
        if norm not in places:
            every = torch.arange(arguments[0].shape[-1])
            places[norm] = Place(
                producer=norm, outputs=every, channels=every, base=family.norm_base
            )
        places[norm].consumers.append(projection)

    with ExitStack() as stack:
        for module in student.modules():
            if is_projection(module):
                stack.callback(module.register_forward_pre_hook(read).remove)
            elif _is_norm(module):
                stack.callback(module.register_forward_hook(give).remove)
        student(input_ids=torch.arange(_FEW_TOKENS)[None], use_cache=False)
    head = student.get_output_embeddings()
    shared = has_shared_table(student)
    # A table that is looked up too cannot be scaled
    return [place for place in places.values() if not (shared and head in place.consumers)]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel, maybe a bias, and nothing else."""
    parameters = dict(module.named_parameters())
    return {"weight"} <= parameters.keys() <= {"weight", "bias"} and all(
        parameter.ndim == 1 for parameter in parameters.values()
    )


def _values(family: Family, layer: nn.Module, heads: LayerHeads) -> Place:
    """A layer's values, which all heads of a group read."""
    attention = family.attention_of(layer)
    count = heads.key_value * heads.size
    if isinstance(attention, FollowerAttention):
        producer: nn.Module = attention.v_proj
        outputs = torch.arange(count)
    else:
        producer = attention.get_submodule(family.heads.values)
        outputs = family.heads.value_outputs(heads)
    channels_N1D = torch.arange(count).view(heads.key_value, 1, heads.size)
    return Place(
        producer=producer,
        outputs=outputs,
        channels=channels_N1D.expand(-1, heads.group, -1).flatten(),
        consumers=[family.output_of(attention)],
    )


def _product(factor: Any, reader: Any) -> Place:
    """What a gate is multiplied with."""
    outputs, channels = len(weight_out_in(factor)), torch.arange(weight_out_in(reader).shape[1])
    return Place(
        producer=factor,
        outputs=channels + outputs - len(channels),
        channels=channels,
        consumers=[reader],
    )
