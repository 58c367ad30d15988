"""A student whose forward pass returns the losses of a stage.

Losses are computed inside `forward` because whatever wraps a model for many GPUs (DDP, FSDP,
DeepSpeed) looks after its parameters, the LM head's too, from there until the backward pass only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.losses import Target, block_loss, imitation_loss, text_loss
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import (
    ATTENTION_NAME,
    EchoAttForCausalLM,
    MaterializedAttention,
)
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME, RecomputedAttention

BlockOutputs = tuple[torch.Tensor, ...]


class HealingStudent(EchoAttForCausalLM):
    """A student in training; the parameters are those of the student that it is made from.

    Attributes:
        settings: Weights and directions of the losses.
    """

    # A loss is a mean over the batch: transformers.Trainer divides by the accumulated batches
    accepts_loss_kwargs = False
    # No modelling file is saved beside a checkpoint
    _auto_class = None
    settings: DistillConfig

    @classmethod
    def of(cls, student: EchoAttForCausalLM, settings: DistillConfig) -> HealingStudent:
        """The same student, with losses for outputs; the module tree is shared, not copied."""
        with torch.device("meta"):
            healing = cls(copy.deepcopy(student.config))
        healing.decoder = student.decoder
        healing.settings = settings
        # Published generation settings may be inconsistent, and transformers would not save them
        healing.generation_config = GenerationConfig()
        return healing

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        target: Target | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch.

        Args:
            input_ids: [B, S], without padding.
            labels: Stage 2: the token ids themselves.
            target: Stage 1: the teacher's side.

        Returns:
            `loss` and its parts, scalars: `blocks`, `kl` and `labels` in stage 1 (before
            they are weighted), `text` in stage 2.
        """
        outputs = block_outputs(super().forward, self, input_ids)
        head, vocab_size = head_of(self.decoder), self.decoder.config.vocab_size
        if target is None:
            assert labels is not None  # noqa: S101 - the trainer passes one of them
            loss = text_loss(head, outputs[-1], labels, vocab_size=vocab_size)
            return {"loss": loss, "text": loss.detach()}
        settings = self.settings
        blocks = block_loss(outputs, target.block_outputs)
        divergence, to_labels = imitation_loss(
            head,
            outputs[-1],
            target,
            temperature=settings.temperature,
            direction=settings.kl_direction,
            vocab_size=vocab_size,
        )
        loss = (
            settings.block_weight * blocks
            + settings.kl_weight * divergence
            + settings.label_weight * to_labels
        )
        parts = {"blocks": blocks, "kl": divergence, "labels": to_labels}
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}


def block_outputs(forward: Any, model: EchoAttForCausalLM, input_ids: torch.Tensor) -> BlockOutputs:
    """The hidden state [B, S, E] after each decoder layer, the last one after the final norm.

    That is how transformers reports hidden states in every family; the input of the first layer,
    which it puts before them, is left out. No logits are computed but one token's, unused.

    Args:
        forward: The forward method of `model`.
        model: A student; of a teacher, the unshared one.
        input_ids: [B, S], without padding.
    """
    chosen = model.decoder.config._attn_implementation  # noqa: SLF001  # it has no public name
    recomputed = chosen == RECOMPUTED_NAME
    shared = (RecomputedAttention if recomputed else MaterializedAttention)(model.sources)
    output = forward(
        input_ids=input_ids,
        use_cache=False,
        logits_to_keep=1,
        output_hidden_states=True,
        shared_attention=shared,
    )
    return tuple(output.hidden_states[1:])


def set_attention(model: EchoAttForCausalLM, *, recomputed: bool) -> None:
    """Choose how `block_outputs` attends."""
    model.decoder.set_attn_implementation(RECOMPUTED_NAME if recomputed else ATTENTION_NAME)
