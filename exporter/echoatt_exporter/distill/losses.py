"""The losses of both stages, in chunks of tokens where logits are needed.

Logits in float32 are the largest thing in distillation: at 8 rows of 2,048 tokens and a vocabulary
of 32,000 one copy is 2 GB, and a loss and its gradient hold several. Here they exist for one chunk
of tokens at a time, and are computed again in the backward pass.

Shapes in names: B batch, S tokens, E hidden size, N tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from echoatt_exporter.distill.config import KlDirection
from echoatt_exporter.share.lm_head import Head

# Logits of one chunk: 64 MiB in float32. Larger chunks gain nothing, on CPU they only leave the
# caches; a vocabulary of 2,048 still takes 8,192 tokens at once, and what fits in one chunk is not
# computed twice.
CHUNK_ELEMENTS = 2**24

# A chunk's losses, each summed over its tokens
_ChunkLoss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Target:
    """What a teacher says about a batch.

    Attributes:
        block_outputs: The hidden state [B, S, E] after each decoder layer, the last one after the
            final norm.
        head: The teacher's head; the last hidden state goes in.
    """

    block_outputs: tuple[torch.Tensor, ...]
    head: Head


def block_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the block outputs, a mean over layers, tokens and elements.

    Args:
        student: A hidden state [B, S, E] for each layer.
        teacher: The same of the teacher.
    """
    losses = [
        F.mse_loss(ours.float(), theirs.float())
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def imitation_loss(
    head: Head,
    hidden_BSE: torch.Tensor,
    target: Target,
    *,
    temperature: float,
    direction: KlDirection,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence to the teacher and cross-entropy to the teacher's most probable token.

    Args:
        head: The student's head.
        hidden_BSE: The student's last hidden state.
        target: The teacher's side.
        temperature: Of the KL, which is multiplied by its square (Hinton et al., arXiv 1503.02531).
        direction: See `echoatt_exporter.distill.config.DistillConfig`.
        vocab_size: For the size of a chunk.

    Returns:
        Both in nats a token, scalars.
    """

    def chunk(ours_NE: torch.Tensor, theirs_NE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_NV = _logits(head, ours_NE)
        with torch.no_grad():
            target_NV = _logits(target.head, theirs_NE)
            labels_N = target_NV.argmax(-1)
            log_target_NV = F.log_softmax(target_NV / temperature, -1)
        log_NV = F.log_softmax(logits_NV / temperature, -1)
        if direction == "student_teacher":
            divergence = F.kl_div(log_target_NV, log_NV, reduction="sum", log_target=True)
        else:
            divergence = F.kl_div(log_NV, log_target_NV, reduction="sum", log_target=True)
        at_one = log_NV if temperature == 1 else F.log_softmax(logits_NV, -1)
        return divergence * temperature**2, F.nll_loss(at_one, labels_N, reduction="sum")

    tokens = hidden_BSE.shape[:-1].numel()
    theirs_NE = target.block_outputs[-1].flatten(0, -2)
    divergence, labels = _in_chunks(chunk, hidden_BSE.flatten(0, -2), theirs_NE, vocab_size)
    return divergence / tokens, labels / tokens


def text_loss(
    head: Head, hidden_BSE: torch.Tensor, labels_BS: torch.Tensor, *, vocab_size: int
) -> torch.Tensor:
    """Cross-entropy of each next token, in nats a token, a scalar.

    Args:
        head: The student's head.
        hidden_BSE: The student's last hidden state.
        labels_BS: The token ids themselves; each is predicted from those before it.
        vocab_size: For the size of a chunk.
    """

    def chunk(ours_NE: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.cross_entropy(_logits(head, ours_NE), labels_N, reduction="sum"),)

    labels_N = labels_BS[:, 1:].flatten()
    (total,) = _in_chunks(chunk, hidden_BSE[:, :-1].flatten(0, -2), labels_N, vocab_size)
    return total / len(labels_N)


def _logits(head: Head, hidden_NE: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in float32."""
    return head(hidden_NE[None])[0].float()


def _in_chunks(
    loss: _ChunkLoss, ours: torch.Tensor, theirs: torch.Tensor, vocab_size: int
) -> list[torch.Tensor]:
    """Sum of a loss's parts over chunks of tokens, computed again in the backward pass."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    pairs = list(zip(torch.split(ours, size), torch.split(theirs, size), strict=True))
    if len(pairs) == 1:
        return list(loss(*pairs[0]))
    # The chunks draw no random numbers
    parts = [
        checkpoint(loss, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs
    ]
    return [torch.stack(sums).sum() for sums in zip(*parts, strict=True)]
