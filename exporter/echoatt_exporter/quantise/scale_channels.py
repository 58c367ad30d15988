"""Scales channels of a student, so that few-bit activations and weights lose less of them.

The kernels round what they read as they round weights: to 8 bits, in blocks that share a scale. A
channel far larger than its neighbours takes their bits, and the weights that read it are seldom
large too. Half of what channels differ in moves over to the weights, as in SmoothQuant (arXiv
2211.10438); by their root mean squares, which lost a fifth less on SmolLM2-135M than by their
largest, as the largest are those of a text's first token. Factors are powers of two: nothing but
exponents changes.

C channels, K inputs of the products.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import nn

from echoatt_exporter.families.projections import weight_out_in
from echoatt_exporter.quantise.places import Place, find_places
from echoatt_exporter.quantise.round_weights import check_numbers
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM

# Enough of the text to see which channels are large
_WINDOWS: Final = 8
_TOKENS_COMPARED: Final = 16
# What a model may differ by afterwards, of its logits' spread. Powers of two change nothing but
# where a norm adds 1 to its weight; scaling what is read elsewhere too changes all.
_MOST_CHANGE: Final = 1e-3


@torch.no_grad()
def scale_channels(student: EchoAttForCausalLM, windows_WS: torch.Tensor) -> bool:
    """Scale channels wherever that leaves what is computed as it is, in place.

    Args:
        student: On the CPU, in float32 and in evaluation mode.
        windows_WS: Calibration text, int64.

    Returns:
        Whether it was done. A student in which something else reads what was scaled is left as it
        was.

    Raises:
        NumericalError: The model computes NaN or infinities.
    """
    places = find_places(student)
    inputs = _input_squares(student, places, windows_WS[:_WINDOWS])
    few_tokens = windows_WS[:1, :_TOKENS_COMPARED]
    before = _logits(student, few_tokens)
    done: list[tuple[Place, torch.Tensor]] = []
    for place, inputs_K in zip(places, inputs, strict=True):
        weights_K = torch.stack([weight_out_in(c).square().sum(0) for c in place.consumers]).sum(0)
        factors_C = factors(place.over_channels(inputs_K), place.over_channels(weights_K))
        place.scale(factors_C)
        done.append((place, factors_C))
    change = (_logits(student, few_tokens) - before).abs().max()
    if change <= _MOST_CHANGE * before.std():
        return True
    for place, factors_C in reversed(done):
        place.scale(1 / factors_C)
    return False


def factors(inputs_C: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """What channels' weights are multiplied with: powers of two around 1, float32 [C].

    Args:
        inputs_C: Sum of each channel's squares.
        weights_C: The same of the weights that read it.
    """
    used_C = (inputs_C > 0) & (weights_C > 0)
    # A channel that does nothing has no factor that a reader of the weights could find again
    levels_C = torch.where(used_C, inputs_C / weights_C, 1).log2() / 4
    mean = levels_C[used_C].mean() if used_C.any() else 0.0
    return torch.where(used_C, torch.exp2((levels_C - mean).round()), 1)


def _input_squares(
    student: EchoAttForCausalLM, places: list[Place], windows_WS: torch.Tensor
) -> list[torch.Tensor]:
    """The sum of squares [K] of each input at each place."""
    squares: dict[nn.Module, torch.Tensor] = {}

    def read(projection: nn.Module, arguments: Any) -> None:
        squares[projection] = arguments[0].square().flatten(0, -2).sum(0)
        check_numbers(squares[projection])

    with ExitStack() as stack:
        for place in places:
            stack.callback(place.consumers[0].register_forward_pre_hook(read).remove)
        _logits(student, windows_WS)
    return [squares[place.consumers[0]] for place in places]


def _logits(student: EchoAttForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The last token's logits [B, 1, V]."""
    output: Any = student(input_ids=tokens_BS, use_cache=False, logits_to_keep=1)
    logits_B1V: torch.Tensor = output.logits
    return logits_B1V
