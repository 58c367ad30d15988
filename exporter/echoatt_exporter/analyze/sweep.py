"""Many students in one run of their teacher: what plans have in common is computed once.

Two plans that agree on the first layers compute the same there. So a run starts with one state, the
teacher's embeddings, and a state branches where plans begin to differ. A pair's student costs the
layers from its follower on, however many pairs are asked for; the plans of one family share what
they have of their parent.

Shapes in names: B windows, C states, T tokens of a window, E hidden size, S queries, H query heads,
N key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.families import family_of
from echoatt_exporter.refit.pair_fits import PairFits
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.loans import Loan, own_order, values_for
from echoatt_exporter.share.modeling_echoatt import FollowerAttention
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME
from echoatt_runtime.contract import SharingPlan

# Tokens that go through a layer at once: bounds what its feed-forward holds
_TOKENS_AT_ONCE = 2048


@dataclass(slots=True)
class _State:
    """Hidden states that some plans have in common so far.

    Attributes:
        plans: Which, as numbers in the run's list.
        loans: By layer, what its sources lend to later layers.
    """

    plans: list[int]
    loans: dict[int, Loan] = field(default_factory=dict)


# States, each with the row of the one that it comes from
_Rows = list[tuple[int, _State]]
# Gives a layer, which has this number, the attention of a source's follower for as long as it lasts
_Follow = Callable[[nn.Module, int, int], AbstractContextManager[None]]


class StudentSweep:
    """Runs students on one loaded teacher, which is as it was after every run."""

    def __init__(self, teacher: PreTrainedModel, fits: PairFits | None = None) -> None:
        """Take a teacher of a supported family.

        Args:
            teacher: The model.
            fits: Followers' output projections; by default they have their own.

        Raises:
            UnsupportedModelError: Its family is not supported.
        """
        self._teacher = teacher
        self._family = family_of(teacher.config)
        self._layers = self._family.layers_of(teacher)
        self._fits = fits
        self._followers: dict[tuple[int, int], FollowerAttention] = {}

    @torch.no_grad()
    def run(self, windows_BT: torch.Tensor, plans: Sequence[SharingPlan]) -> list[torch.Tensor]:
        """What each plan's student hands to the LM head: [B, T, E], after the last norm.

        Args:
            windows_BT: Token ids, int64.
            plans: That fit the teacher.
        """
        branches = _Branches(plans)
        body = getattr(self._teacher, self._teacher.base_model_prefix)
        with lending_attention(self._teacher, RECOMPUTED_NAME), self._branching(branches):
            output = body(input_ids=windows_BT, use_cache=False, shared_attention=branches)
        hidden_CBTE = output.last_hidden_state.unflatten(0, (-1, len(windows_BT)))
        found: dict[int, torch.Tensor] = {}
        for state, hidden_BTE in zip(branches.states, hidden_CBTE, strict=True):
            found |= dict.fromkeys(state.plans, hidden_BTE)
        return [found[number] for number in range(len(plans))]

    @contextmanager
    def _branching(self, branches: _Branches) -> Iterator[None]:
        """Put a branching layer in the place of each layer, and take it back."""
        kept = list(self._layers)
        try:
            for index, layer in enumerate(kept):
                self._layers[index] = _BranchingLayer(layer, index, branches, self._follow)
            yield
        finally:
            for index, layer in enumerate(kept):
                self._layers[index] = layer

    @contextmanager
    def _follow(self, layer: nn.Module, index: int, source: int) -> Iterator[None]:
        """Give a layer a follower's attention, and take it back."""
        attention = self._family.attention_of(layer)
        pair = index, source
        if pair not in self._followers:
            made = self._family.follower_of(attention, self._teacher.config).eval()
            if self._fits is not None:
                made.o_proj = self._fits.of(index, source, made.o_proj)
            self._followers[pair] = made
        try:
            setattr(layer, self._family.attention, self._followers[pair])
            yield
        finally:
            setattr(layer, self._family.attention, attention)


class _Branches:
    """The states of one run, and their attention: a `SharedAttention`.

    Attributes:
        states: In the order of the rows of the hidden states.
    """

    def __init__(self, plans: Sequence[SharingPlan]) -> None:
        self.plans = plans
        self.states = [_State(list(range(len(plans))))]
        self.running: list[_State] = []  # those whose rows are in the layer that runs
        self._lending = [plan.shared_sources for plan in plans]

    def divide(self, layer: int) -> tuple[_Rows, dict[int, _Rows]]:
        """The states behind a layer: those in which it attends itself, and by source the others."""
        own: _Rows = []
        following: dict[int, _Rows] = {}
        for row, parent in enumerate(self.states):
            by_choice: dict[tuple[int, Sequence[int]], list[int]] = {}
            for number in parent.plans:
                plan = self.plans[number]
                choice = plan.sources[layer], plan.head_order(layer)
                by_choice.setdefault(choice, []).append(number)
            for (source, _), numbers in by_choice.items():
                wanted = {s for number in numbers for s in self.plans[number].sources[layer:]}
                loans = {s: loan for s, loan in parent.loans.items() if s in wanted}
                some = own if source == layer else following.setdefault(source, [])
                some.append((row, _State(numbers, loans)))
        return own, following

    def attend(
        self,
        module: nn.Module,
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
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        # No window is padded, so that all rows see alike
        seen = None if mask is None else mask[:1]
        loan = Loan(query_BHSD, key_BNTD, seen, scaling, softcap)
        rows = len(query_BHSD) // len(self.running)
        for number, state in enumerate(self.running):
            if any(layer in self._lending[plan] for plan in state.plans):
                state.loans[layer] = loan.rows(slice(number * rows, (number + 1) * rows))
        return loan.attend(value_BNTD)

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`."""
        layer = module.layer_idx
        values = value_BNTD.chunk(len(self.running))
        contexts = []
        for state, value in zip(self.running, values, strict=True):
            plan = self.plans[state.plans[0]]
            loan = state.loans[plan.sources[layer]]
            order = plan.head_order(layer)
            contexts.append(own_order(loan.attend(values_for(value, order)), order))
        return torch.cat(contexts)


class _BranchingLayer(nn.Module):
    """A layer in which states branch: those of plans in which it follows, and the others."""

    def __init__(self, layer: nn.Module, index: int, branches: _Branches, follow: _Follow) -> None:
        super().__init__()
        self._layer = layer
        self._index = index
        self._branches = branches
        self._follow = follow

    def forward(self, hidden_RTE: torch.Tensor, *arguments: Any, **kwargs: Any) -> torch.Tensor:
        states = self._branches.states
        hidden_CBTE = hidden_RTE.view(len(states), -1, *hidden_RTE.shape[1:])
        own, following = self._branches.divide(self._index)
        outputs = list(self._run(own, hidden_CBTE, arguments, kwargs))
        rows = list(own)
        for source, some in following.items():
            with self._follow(self._layer, self._index, source):
                outputs += self._run(some, hidden_CBTE, arguments, kwargs)
            rows += some
        self._branches.states = [state for _, state in rows]
        return torch.cat(outputs)

    def _run(
        self,
        states: _Rows,
        hidden_CBTE: torch.Tensor,
        arguments: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[torch.Tensor]:
        _, B, T, _ = hidden_CBTE.shape
        step = max(1, _TOKENS_AT_ONCE // (B * T))
        for start in range(0, len(states), step):
            chunk = states[start : start + step]
            self._branches.running = [state for _, state in chunk]
            hidden = hidden_CBTE[[row for row, _ in chunk]].flatten(0, 1)
            output = self._layer(hidden, *arguments, **kwargs)
            yield cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
