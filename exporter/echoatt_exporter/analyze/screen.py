"""What every pair may cost, and every plan, from a few gradients of the teacher.

What a follower's attention gives differs from its own by some d. To second order that costs a
divergence of ½ E[(g·d)²], where g is the gradient at that output of the log-probability of tokens
drawn from the teacher's own predictions: the Fisher information of those predictions (Amari 1998;
with drawn labels as in Kunstner et al. 2019, arXiv 1905.12558). Taken token by token, as here, it
leaves out what one token's change does together with another's, which is noise more than anything.
One backward pass a draw serves all pairs, and the products of two pairs' g·d say what they cost
together: so the sum over a plan's pairs of pairs is an estimate of the plan's cost.

Shapes in names: K draws, B windows at once, T tokens of a window, E hidden size, R rows (tokens) at
once, V vocabulary, H query heads, N key/value heads, D head size, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.families import family_of
from echoatt_exporter.refit.pair_fits import PairFits
from echoatt_exporter.refit.projection_calls import recording
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.lm_head import Head, head_of
from echoatt_exporter.share.loans import Loan, context, own_order, values_for
from echoatt_exporter.share.modeling_echoatt import FollowerAttention
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME
from echoatt_runtime.contract import SharingPlan

# Draws of the next token at every position, each a backward pass
_DRAWS = 4
_BATCH_TOKENS = 1024
# Enough that the estimate is limited by its own order, not by its sample
_TOKENS = 4096
_LOGITS_AT_ONCE = 1 << 22

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class PairScreen:
    """The estimate of what pairs cost, alone and together.

    Attributes:
        pairs: P (follower, source).
        gram: Float64 [P, P], nats a token: on the diagonal what a pair costs alone; a plan costs
            the sum of the rows and columns of its pairs.
    """

    pairs: tuple[Pair, ...]
    gram: NDArray[np.float64]


# Told after each batch of windows how many windows are done, and of how many, with the sum so far
OnScreened = Callable[[int, int, NDArray[np.float64]], None]


def screen_pairs(
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    plans: Sequence[SharingPlan],
    *,
    seed: int = 0,
    fits: PairFits | None = None,
    begun: tuple[int, NDArray[np.float64]] | None = None,
    on_batch: OnScreened | None = None,
) -> PairScreen:
    """Estimate what pairs cost.

    Args:
        teacher: A decoder of a supported family; it is left as it was.
        windows: Token ids, int64 [windows, tokens]; some thousand tokens of them are used.
        plans: The pairs: plans with one follower each, whose heads may be reordered.
        seed: Of the draws.
        fits: Followers' output projections; by default they have their own.
        begun: Windows done by an earlier call of the same arguments, and their sum, as
            `on_batch` was told.
        on_batch: Called after each batch of windows.
    """
    T = windows.shape[1]
    per_batch = max(1, _BATCH_TOKENS // T)
    windows = windows[: max(2, _TOKENS // T)].to(teacher.device)
    done, gram_PP = begun or (0, np.zeros((len(plans), len(plans))))
    with lending_attention(teacher, RECOMPUTED_NAME), _frozen(teacher):
        for start in range(done, len(windows), per_batch):
            batch_BT = windows[start : start + per_batch]
            # Each batch draws for itself, so that it does not matter which was the first
            generator = torch.Generator(teacher.device).manual_seed(seed * len(windows) + start)
            gram_PP = gram_PP + _gram_of(teacher, batch_BT, plans, fits, generator)
            if on_batch is not None:
                on_batch(start + len(batch_BT), len(windows), gram_PP)
    pairs = [(layer, plan.sources[layer]) for plan in plans for layer in plan.followers]
    return PairScreen(tuple(pairs), gram_PP / (2 * _DRAWS * windows.numel()))


def _gram_of(
    teacher: PreTrainedModel,
    batch_BT: torch.Tensor,
    plans: Sequence[SharingPlan],
    fits: PairFits | None,
    generator: torch.Generator,
) -> NDArray[np.float64]:
    """Float64 [P, P]: products of pairs' g·d, summed over draws and tokens."""
    attention = _Recorder()
    body = getattr(teacher, teacher.base_model_prefix)
    family = family_of(teacher.config)
    own = [family.output_of(family.attention_of(layer)) for layer in family.layers_of(teacher)]
    with torch.enable_grad(), ExitStack() as stack:
        calls = [stack.enter_context(recording(projection)) for projection in own]
        output_BTE = body(
            input_ids=batch_BT, use_cache=False, shared_attention=attention
        ).last_hidden_state
    drawn_KBTE = _drawn_gradients(head_of(teacher), output_BTE, generator)
    gradients = [
        torch.autograd.grad(
            output_BTE, [call.output for call in calls], drawn_BTE, retain_graph=True
        )
        for drawn_BTE in drawn_KBTE
    ]
    del drawn_KBTE, output_BTE
    given = [call.output.detach() for call in calls]
    effects = torch.empty((len(plans), _DRAWS, *batch_BT.shape), device=batch_BT.device)
    # By source: its probabilities serve all its followers
    with torch.no_grad():
        for source, loan in enumerate(attention.loans):
            lent = [n for n, plan in enumerate(plans) if source in plan.shared_sources]
            probabilities_BHTT = loan.probabilities() if lent else None
            for number in lent:
                assert probabilities_BHTT is not None  # noqa: S101 - it was made for these
                (layer,) = plans[number].followers
                order = plans[number].head_order(layer)
                value_BNTD = values_for(attention.values[layer], order)
                changed_BTHD = own_order(context(probabilities_BHTT, value_BNTD), order)
                output = own[layer] if fits is None else fits.of(layer, source, own[layer])
                change_BTE = output(changed_BTHD.flatten(2)) - given[layer]
                for draw, by_layer in enumerate(gradients):
                    effects[number, draw] = (by_layer[layer] * change_BTE).sum(dim=2)
    effects_PM = effects.flatten(1)
    return (effects_PM @ effects_PM.T).cpu().numpy().astype(np.float64)


def _drawn_gradients(
    head: Head, output_BTE: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """[K, B, T, E]: the gradient of the log-probability of each position's drawn token."""
    flat_NE = output_BTE.detach().flatten(0, 1)
    parts = []
    rows = max(1, _LOGITS_AT_ONCE // head(flat_NE[None, :1]).shape[-1])
    for hidden_RE in torch.split(flat_NE, rows):
        with torch.enable_grad():
            leaf_RE = hidden_RE.clone().requires_grad_()
            logits_RV = head(leaf_RE[None])[0]
        p_RV = logits_RV.detach().float().softmax(dim=-1)
        tokens_RK = p_RV.multinomial(_DRAWS, replacement=True, generator=generator)
        by_draw: list[torch.Tensor] = []
        for tokens_R in tokens_RK.T:
            chosen_RV = p_RV.neg()
            chosen_RV[torch.arange(len(tokens_R)), tokens_R] += 1
            by_draw += torch.autograd.grad(
                logits_RV, leaf_RE, chosen_RV.to(logits_RV.dtype), retain_graph=True
            )
        parts.append(torch.stack(by_draw))
    return torch.cat(parts, dim=1).view(-1, *output_BTE.shape)


class _Recorder:
    """The teacher's own attention, with everything kept: a `SharedAttention`.

    Attributes:
        loans: Each layer's attention without values.
        values: Each layer's [B, N, T, D].
    """

    def __init__(self) -> None:
        self.loans: list[Loan] = []
        self.values: list[torch.Tensor] = []

    def attend(
        self,
        module: nn.Module,  # noqa: ARG002 - layers come in their order
        query_BHSD: torch.Tensor,
        key_BNTD: torch.Tensor,
        value_BNTD: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
        dropout: float,  # noqa: ARG002 - there is none in evaluation mode
    ) -> torch.Tensor:
        """See `SharedAttention.attend`."""
        seen = None if mask is None else mask[:1]
        loan = Loan(query_BHSD, key_BNTD, seen, scaling, softcap)
        context_BTHD = loan.attend(value_BNTD)
        if not self.loans:  # nothing in front of the first needs a gradient
            context_BTHD = context_BTHD.detach().requires_grad_()
        self.values.append(value_BNTD.detach())
        self.loans.append(Loan(query_BHSD.detach(), key_BNTD.detach(), seen, scaling, softcap))
        return context_BTHD

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`: a teacher has no followers."""
        raise NotImplementedError


@contextmanager
def _frozen(teacher: PreTrainedModel) -> Iterator[None]:
    """Keep the weights out of the graph; as they were afterwards."""
    learning = [weight for weight in teacher.parameters() if weight.requires_grad]
    try:
        for weight in learning:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)
