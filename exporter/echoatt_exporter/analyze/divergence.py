"""How far students are from their teacher, from what both hand to the LM head.

The teacher's distribution of a few tokens is made once for all students. It is float32 arithmetic
on the model's device: in float64, as parity judges, the vocabulary of a public checkpoint takes
longer than the layers do, and what float32 loses (about 1e-6 nats a token) is far below what plans
differ by.

Shapes in names: B windows, T tokens of a window, E hidden size, R rows (tokens) at once,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from echoatt_exporter.share.lm_head import Head

# Logits are made for as many tokens at once as keep one float32 table below this many elements
_LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False, slots=True)
class Divergence:
    """Of one student on some windows.

    Attributes:
        kl: KL(teacher ‖ student) of the next token's distribution, nats, each window's mean.
        log_p: The student's log-probability of the windows' own next tokens, each window's mean.
    """

    kl: NDArray[np.float64]
    log_p: NDArray[np.float64]


@torch.no_grad()
def divergences(
    head: Head,
    vocab_size: int,
    windows_BT: torch.Tensor,
    teacher_BTE: torch.Tensor,
    students_BTE: Sequence[torch.Tensor],
) -> list[Divergence]:
    """Each student's divergence from the teacher.

    Args:
        head: From the last hidden states to logits.
        vocab_size: V.
        windows_BT: Token ids.
        teacher_BTE: The teacher's last hidden states, behind the last norm.
        students_BTE: The students', as many as there are.
    """
    B, T = windows_BT.shape
    rows = max(1, _LOGITS_AT_ONCE // vocab_size)
    next_N = windows_BT.roll(-1, dims=1).flatten()  # a window's last one is not used
    flat = [hidden_BTE.flatten(0, 1) for hidden_BTE in students_BTE]
    kl_SN = torch.empty((len(flat), B * T), dtype=torch.float64)
    log_p_SN = torch.empty_like(kl_SN)
    for start in range(0, B * T, rows):
        part = slice(start, start + rows)
        logits_RV = head(teacher_BTE.flatten(0, 1)[None, part])[0].float()
        total_R = logits_RV.logsumexp(dim=-1)
        p_RV = (logits_RV - total_R[:, None]).exp_()
        mean_R = (p_RV * logits_RV).sum(dim=-1) - total_R
        del logits_RV
        for student, hidden_NE in enumerate(flat):
            found_RV = head(hidden_NE[None, part])[0].float()
            total_R = found_RV.logsumexp(dim=-1)
            kl_SN[student, part] = (mean_R - ((p_RV * found_RV).sum(dim=-1) - total_R)).double()
            chosen_R = found_RV.gather(1, next_N[part, None])[:, 0]
            log_p_SN[student, part] = (chosen_R - total_R).double()
    kl_SB = kl_SN.view(-1, B, T).mean(dim=2)
    log_p_SB = log_p_SN.view(-1, B, T)[:, :, :-1].mean(dim=2)
    return [
        # Rounding may leave the least of divergences a shade below nothing
        Divergence(kl.clamp(min=0).numpy(), log_p.numpy())
        for kl, log_p in zip(kl_SB, log_p_SB, strict=True)
    ]
