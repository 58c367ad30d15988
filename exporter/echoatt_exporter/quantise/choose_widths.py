"""Chooses the weights that get 8 bits in a bundle of 4, by what their rounding costs."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.errors import ExportError
from echoatt_exporter.families.projections import is_projection, weight_out_in
from echoatt_exporter.quantise.round_weights import (
    check_numbers,
    has_shared_table,
    nearest,
    tables_of,
)
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Bits, Quantisation

_SEED: Final = 20240914
# Tokens that costs are estimated on: enough to rank weights
_WINDOWS: Final = 4
_LENGTH: Final = 128
_SCALE_BYTES: Final = 4


@dataclass(eq=False)
class _Group:
    """Projections of one input, which one product computes.

    Attributes:
        names: Of the modules, in the decoder.
        cost: KL divergence in nats a token that their rounding to 4 bits is expected to cost.
        bytes: What 8 bits would take more.
    """

    names: list[str] = field(default_factory=list)
    cost: float = 0.0
    bytes: int = 0


def choose_widths(
    student: EchoAttForCausalLM,
    quantisation: Quantisation,
    windows_WS: torch.Tensor,
    most_bytes: int,
) -> Quantisation:
    """Give 8 bits to the weights whose rounding costs most for its bytes, while there is room.

    What rounding a weight costs is taken to second order: half the expected square of the change
    that it makes to its outputs times the gradient of the model's log-likelihood there (the
    diagonal of the Fisher information), on text, with labels that the model draws itself.

    Args:
        student: On the CPU, in float32, not rounded yet.
        quantisation: With 4 bits everywhere.
        windows_WS: Text, int64.
        most_bytes: What all weights may take.

    Raises:
        ExportError: They take more with 4 bits everywhere.
    """
    room = most_bytes - weight_bytes(student, quantisation)
    if room < 0:
        raise ExportError(
            f"with 4 bits everywhere the weights take {-room / 1e6:,.1f} MB more than there is room"
            " for; allow a larger bundle"
        )
    head = tables_of(student)[0]
    names = {module: name for name, module in student.decoder.named_modules()}
    wide: list[str] = []
    for group in sorted(_groups(student, quantisation, windows_WS), key=_worth, reverse=True):
        if group.bytes <= room:
            room -= group.bytes
            wide += group.names
    if names[head] not in wide:
        return dataclasses.replace(quantisation, wide=tuple(sorted(wide)))
    wide.remove(names[head])
    return dataclasses.replace(
        quantisation, wide=tuple(sorted(wide)), head_bits=8, embedding_bits=8
    )


def weight_bytes(student: EchoAttForCausalLM, quantisation: Quantisation) -> int:
    """What all weights of a bundle take.

    Args:
        student: The model.
        quantisation: How it is rounded.
    """
    head, embedding = tables_of(student)
    size = quantisation.block_size
    rounded: dict[nn.Linear | Conv1D | nn.Embedding, Bits] = {
        module: quantisation.bits_of(name)
        for name, module in student.decoder.named_modules()
        if is_projection(module)
    }
    rounded[head] = quantisation.head_bits
    if not has_shared_table(student):
        rounded[embedding] = quantisation.embedding_bits
    matrices = {id(module.weight) for module in (*rounded, embedding)}
    others = {id(p): p.numel() for p in student.parameters() if id(p) not in matrices}
    return 4 * sum(others.values()) + sum(
        _bytes(module, bits, size) for module, bits in rounded.items()
    )


def _bytes(module: nn.Linear | Conv1D | nn.Embedding, bits: Bits, block_size: int) -> int:
    """What a matrix takes: whole blocks of inputs, each with a scale."""
    outputs, inputs = weight_out_in(module).shape
    blocks = math.ceil(inputs / block_size)
    return outputs * blocks * (block_size * bits // 8 + _SCALE_BYTES)


def _groups(
    student: EchoAttForCausalLM, quantisation: Quantisation, windows_WS: torch.Tensor
) -> list[_Group]:
    """What may be widened, with what its rounding is expected to cost."""
    seen = _watch(student, windows_WS[:_WINDOWS, :_LENGTH])
    names = {module: name for name, module in student.decoder.named_modules()}
    size = quantisation.block_size
    groups: dict[int, _Group] = {}
    with torch.no_grad():
        for module, (inputs_TK, slopes_TN) in seen.items():
            weight_NK = weight_out_in(module)
            lost_TN = inputs_TK @ (nearest(weight_NK, 4, size) - weight_NK).T
            group = groups.setdefault(inputs_TK.data_ptr(), _Group())
            group.names.append(names[module])
            group.cost += float((lost_TN * slopes_TN).square().sum()) / 2 / len(inputs_TK)
            group.bytes += _bytes(module, 8, size) - _bytes(module, 4, size)
    return list(groups.values())


_Seen = dict["nn.Linear | Conv1D", tuple[torch.Tensor, torch.Tensor]]


def _watch(student: EchoAttForCausalLM, windows_WS: torch.Tensor) -> _Seen:
    """Each projection's inputs [T, K], and the slopes [T, N] of the log-likelihood there."""
    inputs: dict[nn.Linear | Conv1D, torch.Tensor] = {}
    outputs: dict[nn.Linear | Conv1D, torch.Tensor] = {}

    def keep(module: Any, arguments: tuple[torch.Tensor], output_BSN: torch.Tensor) -> None:
        inputs[module], outputs[module] = arguments[0].detach(), output_BSN

    def begin(_module: nn.Module, _arguments: Any, rows_BSE: torch.Tensor) -> torch.Tensor:
        return rows_BSE.detach().requires_grad_()

    with ExitStack() as stack, torch.enable_grad():
        embedding = tables_of(student)[1]
        stack.callback(embedding.register_forward_hook(begin).remove)
        for module in student.modules():
            if is_projection(module):
                stack.callback(module.register_forward_hook(keep).remove)
        logits_BSV: Any = student(input_ids=windows_WS, use_cache=False).logits
        check_numbers(logits_BSV)
        log_odds_TV = logits_BSV.float().flatten(0, 1).log_softmax(-1)
        random = torch.Generator().manual_seed(_SEED)
        drawn_T1 = torch.multinomial(log_odds_TV.detach().exp(), 1, generator=random)
        slopes = torch.autograd.grad(log_odds_TV.gather(1, drawn_T1).sum(), list(outputs.values()))
    return {
        module: (inputs[module].flatten(0, 1), slope.flatten(0, 1))
        for module, slope in zip(outputs, slopes, strict=True)
    }


def _worth(group: _Group) -> float:
    return group.cost / group.bytes
