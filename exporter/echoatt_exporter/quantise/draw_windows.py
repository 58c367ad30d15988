"""Calibration text that the model itself writes."""

from __future__ import annotations

from typing import Any, Final

import torch

from echoatt_exporter.quantise.round_weights import check_numbers
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM

_SEED: Final = 20240914


@torch.no_grad()
def draw_windows(
    student: EchoAttForCausalLM, *, count: int, length: int, begin: int | None
) -> torch.Tensor:
    """Let a model continue from one token that is drawn evenly, and from then on by its own odds.

    What a model writes has the statistics that it was trained on, and needs no data (LLM-QAT, arXiv
    2305.17888).

    Args:
        student: In evaluation mode.
        count: W.
        length: S, at least 2.
        begin: A token in front of all, if the model has one that begins a text.

    Raises:
        NumericalError: The model computes NaN or infinities.

    Returns:
        The windows, int64 [W, S]; the same for the same weights.
    """
    random = torch.Generator().manual_seed(_SEED)
    size: int = student.decoder.config.vocab_size
    drawn_Wn = torch.randint(size, (count, 1), generator=random)
    if begin is not None:
        drawn_Wn = torch.cat([torch.full((count, 1), begin), drawn_Wn], dim=1)
    step, cache = drawn_Wn, None
    while drawn_Wn.shape[1] < length:
        output: Any = student(
            input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        check_numbers(output.logits)
        odds_WV = output.logits[:, -1].float().softmax(-1)
        step = torch.multinomial(odds_WV, 1, generator=random)
        drawn_Wn = torch.cat([drawn_Wn, step], dim=1)
    return drawn_Wn
