"""From the last hidden state to logits, by the family's own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

Head = Callable[[torch.Tensor], torch.Tensor]


class _NoLayers(nn.Module):
    """Stands where the decoder layers are and hands its input on, as a body's output.

    Older families look for every field that a body's output can have.
    """

    def forward(
        self, *_: Any, inputs_embeds: torch.Tensor, **__: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def head_of(decoder: PreTrainedModel) -> Head:
    """What `decoder` does after its final norm: LM head, soft cap, scaling, whatever it is.

    The family's own `forward` runs, on a shallow copy of the model whose layers hand their input
    on: no family's extras are written again here, none can be forgotten, and the parameters are the
    model's own.

    Args:
        decoder: A teacher, or a student's `decoder`.

    Returns:
        A function from hidden states [B, S, E] after the final norm to logits [B, S, V].
    """
    head = copy.copy(decoder)
    # Setting the submodule by its name would change the decoder's own, which the copy shares
    modules = {**decoder._modules, decoder.base_model_prefix: _NoLayers()}  # noqa: SLF001
    head._modules = modules  # noqa: SLF001

    def logits(hidden_BSE: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = head(inputs_embeds=hidden_BSE).logits
        return output

    return logits
