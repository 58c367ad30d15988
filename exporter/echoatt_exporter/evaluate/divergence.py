"""How far one model's predictions of the next token are from another's.

Shapes in names: R rows (tokens) at once, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def next_token_divergence(reference_RV: torch.Tensor, model_RV: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence KL(reference ‖ model) of each row's distribution.

    The sum over the vocabulary of p · (log p - log q), p the reference's probabilities and q the
    model's (Kullback and Leibler 1951): how many nats the model's loss is above the reference's own
    where the next token is drawn from the reference. What rounding costs may be less than float32's
    own error in such a sum, so it is taken in float64.

    Args:
        reference_RV: Logits.
        model_RV: Logits over the same vocabulary, of the same rows, on the same device.

    Returns:
        Nats, float64 [R]; infinite where the model rules out what the reference does not.
    """
    log_p_RV, log_q_RV = (F.log_softmax(rows.double(), dim=-1) for rows in (reference_RV, model_RV))
    terms_RV = log_p_RV.exp() * (log_p_RV - log_q_RV)
    # What the reference rules out adds nothing, whatever the model says of it
    return terms_RV.where(log_p_RV != -torch.inf, 0.0).sum(dim=-1)


def same_top_token(reference_RV: torch.Tensor, model_RV: torch.Tensor) -> torch.Tensor:
    """Whether both find the same token most probable: bool [R].

    Args:
        reference_RV: Logits.
        model_RV: As in `next_token_divergence`.
    """
    return reference_RV.argmax(dim=-1) == model_RV.argmax(dim=-1)
