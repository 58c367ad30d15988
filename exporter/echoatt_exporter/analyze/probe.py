"""What a sharing plan costs: the divergence from the teacher, measured without building students.

Shapes in names: W windows, B windows at once, T tokens of a window, E hidden size, R rows (tokens)
at once, V vocabulary, N key/value heads, S queries, H query heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.families import family_of
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import (
    ATTENTION_NAME,
    FollowerAttention,
    MaterializedAttention,
)
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.measures import kl_divergence, log_probabilities, perplexity

# Logits are made for as many tokens at once as keep one float32 table below this many elements.
_LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a plan costs on the probe's windows, before any training.

    Attributes:
        kl: KL divergence teacher‖student of the next-token distribution, nats, mean over tokens.
        kl_standard_error: Of `kl`, from its spread over the windows.
        perplexity: The student's, of the windows' own next tokens.
        teacher_perplexity: The teacher's, of the same tokens.
    """

    kl: float
    kl_standard_error: float
    perplexity: float
    teacher_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        """The student's perplexity over the teacher's."""
        return self.perplexity / self.teacher_perplexity


class PlanProbe:
    """Measures sharing plans on one loaded teacher, which is as it was after every measurement.

    For a measurement the followers' attention modules are swapped for a student's, so that what
    runs is the student, down to its arithmetic. Layers before the first follower compute what the
    teacher computes: they are left out, but for sources that lend their probabilities, and the rest
    starts from the teacher's own hidden states.

    Attributes:
        teacher: The model.
        architecture: Its shape.
        teacher_perplexity: Of the windows' own next tokens.
        measurements: Plans measured so far.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        windows: torch.Tensor,
        *,
        batch_size: int = 4,
        reuse_bytes: int = 1 << 31,
    ) -> None:
        """Run the teacher once.

        Args:
            teacher: A decoder of a supported family, on any device.
            windows: Token ids, int64 [windows, tokens]; at least two of each.
            batch_size: Windows run at once. A measurement holds one batch's attention maps of the
                sources that lend.
            reuse_bytes: The most that the teacher's hidden states of all layers may take; where
                they take more, every measurement runs all layers.

        Raises:
            UnsupportedModelError: The teacher's family is not supported.
            AnalysisError: Too few windows, too long ones, token ids that the model lacks, or a
                loss that is not a number.
        """
        self.teacher = teacher
        self.architecture = architecture_of(teacher.config)
        self._check(windows)
        self._family = family_of(teacher.config)
        self._layers = self._family.layers_of(teacher)
        self._head = head_of(teacher)
        self._followers: dict[int, FollowerAttention] = {}
        self._batches = torch.split(windows.to(teacher.device), batch_size)
        elements = self.architecture.num_layers * windows.numel() * _hidden_size(teacher)
        self._reuses = elements * teacher.dtype.itemsize <= reuse_bytes
        self._inputs: list[dict[int, torch.Tensor]] = []  # by batch, then by layer: [B, T, E]
        self._outputs: list[torch.Tensor] = []  # by batch: [B, T, E]
        self.measurements = 0
        unshared = SharingPlan.unshared(self.architecture.num_layers)
        log_p = []
        with torch.no_grad(), self._attending(unshared):
            for batch_BT in self._batches:
                with self._recording():
                    self._outputs.append(self._hidden_states(batch_BT, unshared))
                log_p.append(self._teacher_log_p(self._outputs[-1], batch_BT))
        self.teacher_perplexity = _finite(perplexity(np.concatenate(log_p)))

    def _check(self, windows: torch.Tensor) -> None:
        if windows.ndim != 2 or min(windows.shape) < 2:
            raise AnalysisError(
                f"windows of shape {list(windows.shape)} tell nothing of the spread; give at least"
                " two windows of at least two tokens"
            )
        architecture = self.architecture
        if windows.shape[1] > architecture.context_length:
            raise AnalysisError(
                f"windows of {windows.shape[1]} tokens are longer than the model's context of"
                f" {architecture.context_length}; make them shorter"
            )
        lowest, highest = int(windows.min()), int(windows.max())
        if lowest < 0 or highest >= architecture.vocab_size:
            raise AnalysisError(
                f"token id {highest if lowest >= 0 else lowest} is outside the model's vocabulary"
                f" of {architecture.vocab_size}; use the model's own tokenizer"
            )

    @torch.no_grad()
    def measure(self, plan: SharingPlan) -> PlanCost:
        """Run the student that `plan` makes on all windows.

        Args:
            plan: Any plan for the teacher, head orders included.

        Raises:
            PlanError: The plan does not fit the teacher.
            AnalysisError: The student's loss is not a number.
        """
        self.architecture.validate_plan(plan)
        divergences, log_p = [], []
        with self._attending(plan):
            for index, batch_BT in enumerate(self._batches):
                with self._resuming(plan, index):
                    hidden_BTE = self._hidden_states(batch_BT, plan)
                kl_BT, log_p_BT = self._compare(self._outputs[index], hidden_BTE, batch_BT)
                divergences.append(kl_BT.mean(axis=1))
                log_p.append(log_p_BT)
        self.measurements += 1
        kl_W = np.concatenate(divergences)
        return PlanCost(
            kl=_finite(float(kl_W.mean())),
            kl_standard_error=float(kl_W.std(ddof=1)) / math.sqrt(len(kl_W)),
            perplexity=_finite(perplexity(np.concatenate(log_p))),
            teacher_perplexity=self.teacher_perplexity,
        )

    def _hidden_states(self, batch_BT: torch.Tensor, plan: SharingPlan) -> torch.Tensor:
        """The decoder's output [B, T, E] after its last norm."""
        body = getattr(self.teacher, self.teacher.base_model_prefix)
        attention = _AlignedAttention(plan)
        output = body(input_ids=batch_BT, use_cache=False, shared_attention=attention)
        return cast(torch.Tensor, output.last_hidden_state)

    def _compare(
        self, teacher_BTE: torch.Tensor, student_BTE: torch.Tensor, batch_BT: torch.Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """KL [B, T] to the teacher, and the next token's log-probability [B, T-1]."""
        divergences, log_p = [], []
        rows = zip(*map(self._rows, (teacher_BTE, student_BTE, _next(batch_BT))), strict=True)
        for teacher_RE, student_RE, next_R in rows:
            teacher_RV, student_RV = map(self._logits, (teacher_RE, student_RE))
            divergences.append(kl_divergence(teacher_RV, student_RV))
            log_p.append(log_probabilities(student_RV, next_R.cpu().numpy()))
        kl_BT, log_p_BT = (
            np.concatenate(part).reshape(batch_BT.shape) for part in (divergences, log_p)
        )
        return kl_BT, log_p_BT[:, :-1]

    def _teacher_log_p(
        self, hidden_BTE: torch.Tensor, batch_BT: torch.Tensor
    ) -> NDArray[np.float64]:
        """The teacher's log-probability [B, T-1] of the next token."""
        rows = zip(*map(self._rows, (hidden_BTE, _next(batch_BT))), strict=True)
        log_p = [
            log_probabilities(self._logits(hidden_RE), next_R.cpu().numpy())
            for hidden_RE, next_R in rows
        ]
        return np.concatenate(log_p).reshape(batch_BT.shape)[:, :-1]

    def _rows(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        """A tensor [B, T, …] cut into pieces [R, …] for which logits fit in memory."""
        return torch.split(
            tokens.flatten(0, 1), max(1, _LOGITS_AT_ONCE // self.architecture.vocab_size)
        )

    def _logits(self, hidden_RE: torch.Tensor) -> NDArray[np.float32]:
        """The next token's logits [R, V]."""
        logits_RV: NDArray[np.float32] = self._head(hidden_RE[None])[0].float().cpu().numpy()
        return logits_RV

    @contextmanager
    def _attending(self, plan: SharingPlan) -> Iterator[None]:
        """Give the teacher a student's attention, and take it back."""
        config = self.teacher.config
        implementation = config._attn_implementation  # noqa: SLF001  # it has no public name
        training = [module for module in self.teacher.modules() if module.training]
        kept = {layer: self._family.attention_of(self._layers[layer]) for layer in plan.followers}
        try:
            self.teacher.eval()
            self.teacher.set_attn_implementation(ATTENTION_NAME)
            for layer, attention in kept.items():
                if layer not in self._followers:
                    made = self._family.follower_of(attention, config)
                    self._followers[layer] = made.eval()
                setattr(self._layers[layer], self._family.attention, self._followers[layer])
            yield
        finally:
            for layer, attention in kept.items():
                setattr(self._layers[layer], self._family.attention, attention)
            self.teacher.set_attn_implementation(implementation)
            for module in training:
                module.training = True

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep what enters each layer."""
        self._inputs.append({})
        if not self._reuses:
            yield
            return

        def keep(layer: int, hidden_BTE: torch.Tensor) -> None:
            self._inputs[-1][layer] = hidden_BTE

        handles = [
            module.register_forward_pre_hook(lambda _, args, layer=layer: keep(layer, args[0]))
            for layer, module in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _resuming(self, plan: SharingPlan, batch: int) -> Iterator[None]:
        """Start from the teacher's hidden states where the plan's first follower is."""
        known, kept = self._inputs[batch], list(self._layers)
        if not (known and plan.followers):
            yield
            return
        first, lending = plan.followers[0], plan.shared_sources
        try:
            for layer in range(first + 1):
                runs = layer == first or layer in lending
                self._layers[layer] = _Restarted(kept[layer], known[layer]) if runs else _LeftOut()
            yield
        finally:
            for layer, module in enumerate(kept):
                self._layers[layer] = module


class _Restarted(nn.Module):
    """A layer that takes the hidden states it was made with in the place of those it is given."""

    def __init__(self, layer: nn.Module, hidden_BTE: torch.Tensor) -> None:
        super().__init__()
        self._layer = layer
        self._hidden_BTE = hidden_BTE

    def forward(self, _hidden_BTE: torch.Tensor, *arguments: Any, **kwargs: Any) -> Any:
        return self._layer(self._hidden_BTE, *arguments, **kwargs)


class _LeftOut(nn.Module):
    """A layer that does nothing."""

    def forward(self, hidden_BTE: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_BTE


class _AlignedAttention(MaterializedAttention):
    """Shared attention in which a follower's heads read their source's in the plan's order.

    Reordering the values and what comes out is what a student's reordered projections do.
    """

    def __init__(self, plan: SharingPlan) -> None:
        super().__init__(plan.sources)
        self._plan = plan

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`."""
        order = self._plan.head_order(module.layer_idx)
        if not order:
            return super().follow(module, value_BNTD)
        group = len(order) // value_BNTD.shape[1]
        of_source = [head // group for head in order[::group]]
        context_BSHD = super().follow(module, value_BNTD[:, of_source])
        of_follower = sorted(range(len(order)), key=order.__getitem__)  # the inverse order
        return context_BSHD[:, :, of_follower]


def _hidden_size(teacher: PreTrainedModel) -> int:
    return cast(nn.Embedding, teacher.get_input_embeddings()).embedding_dim


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise AnalysisError("the model's loss is not a number: it overflows; try float32")
    return value


def _next(batch_BT: torch.Tensor) -> torch.Tensor:
    """Each token's next one; the last column, which has none, is not to be used."""
    return batch_BT.roll(-1, dims=1)
