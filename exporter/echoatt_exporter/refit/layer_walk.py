"""Takes windows of text through a decoder one layer at a time: all through one before the next.

Of a family no more is assumed than what `Family` says and that its layers hand hidden states on:
what else a layer is called with is taken from a run in which the layers compute nothing.

Shapes in names: W windows, B windows at once, T tokens of a window, E hidden size, H query heads,
N key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.families import family_of
from echoatt_exporter.refit.spilled import SpilledTensor
from echoatt_exporter.share.loans import Loan
from echoatt_exporter.share.modeling_echoatt import FollowerAttention

# Tokens that go through a layer at once: bounds what its feed-forward holds
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer is called with besides hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """What a layer's attention could be made of.

    Attributes:
        loans: By earlier layer, what it lends.
        values: The layer's own, [B, N, T, D].
    """

    loans: Mapping[int, Loan]
    values: torch.Tensor


class LayerWalk:
    """One decoder and the states of some windows in front of one of its layers.

    Attributes:
        layer: The layer that comes next.
        batches: The windows that go through a layer together.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        sources: Sequence[int],
        windows_WT: torch.Tensor,
        last_borrowers: Mapping[int, int] | None = None,
    ) -> None:
        """Stand in front of the first layer.

        Args:
            decoder: A student's `decoder`, or its teacher, inside `lending_attention`.
            sources: The student's sharing plan.
            windows_WT: Token ids, int64.
            last_borrowers: By source the last layer that its attention is kept for; by default its
                last follower.
        """
        W, T = windows_WT.shape
        self.layer = 0
        self.windows_WT = windows_WT
        step = max(1, _TOKENS_AT_ONCE // T)
        self.batches = [slice(begin, min(begin + step, W)) for begin in range(0, W, step)]
        self._decoder = decoder
        self._sources = sources
        self._layers = family_of(decoder.config).layers_of(decoder)
        if last_borrowers is None:
            last_borrowers = {s: layer for layer, s in enumerate(sources) if layer != s}
        self._last_borrowers = last_borrowers
        self._loans: dict[int, _SpilledLoans] = {}
        self._calls: dict[int, list[_Call]] = {}
        self._states: SpilledTensor | None = None
        for rows in self.batches:
            hidden_BTE = self._embed(windows_WT[rows])
            if self._states is None:
                self._states = SpilledTensor((W, T, hidden_BTE.shape[-1]), hidden_BTE.dtype)
            self._states.write(rows, hidden_BTE)

    def states(self, rows: slice) -> torch.Tensor:
        """Hidden states [B, T, E] in front of the layer that comes next."""
        assert self._states is not None  # noqa: S101 - there is at least one window
        return self._states.read(rows)

    def run(self, rows: slice, instead: nn.Module | None = None) -> torch.Tensor:
        """What the next layer makes of some windows, [B, T, E]; the walk stays where it is.

        Args:
            rows: The windows, one of `batches`.
            instead: Another model's layer of the same place, to run on these states.
        """
        layer = self._layers[self.layer] if instead is None else instead
        return self._run_layer(self.layer, layer, self.states(rows), self._attention(rows))

    def look(self, rows: slice) -> Look:
        """Run the next layer, which must be a source, for what attention there is made of."""
        attention = self._attention(rows)
        self._run_layer(self.layer, self._layers[self.layer], self.states(rows), attention)
        loans = {source: spilled.read(rows) for source, spilled in self._loans.items()}
        return Look(loans, attention.values[self.layer])

    def advance(self) -> None:
        """Take all windows through the next layer."""
        assert self._states is not None  # noqa: S101 - there is at least one window
        layer = self.layer
        lends = layer in self._last_borrowers
        spilled = _SpilledLoans(len(self.windows_WT)) if lends else None
        for rows in self.batches:
            attention = self._attention(rows)
            hidden_BTE = self._run_layer(layer, self._layers[layer], self.states(rows), attention)
            self._states.write(rows, hidden_BTE)
            if spilled is not None:
                spilled.write(rows, attention.loans[layer])
        if spilled is not None:
            self._loans[layer] = spilled
        for source in [s for s in self._loans if self._last_borrowers[s] <= layer]:
            del self._loans[source]
        self.layer += 1

    def finish(self, rows: slice) -> torch.Tensor:
        """What some windows become behind all other layers and the last norm, [B, T, E]."""
        hidden_BTE = self.states(rows)
        attention = self._attention(rows)
        for layer in range(self.layer, len(self._layers)):
            hidden_BTE = self._run_layer(layer, self._layers[layer], hidden_BTE, attention)
        # The body's first layer gives these states, whatever it is given, and the others pass it on
        with self._instead([_Passing(hidden_BTE), *(_Passing() for _ in self._layers[1:])]):
            return self._run_body(self.windows_WT[rows])

    def _attention(self, rows: slice) -> _WalkingAttention:
        return _WalkingAttention(self._sources, self._loans, rows)

    def _run_layer(
        self, index: int, layer: nn.Module, hidden_BTE: torch.Tensor, attention: _WalkingAttention
    ) -> torch.Tensor:
        call = self._calls[len(hidden_BTE)][index]
        keywords = {**call.keywords, "shared_attention": attention}
        output = layer(hidden_BTE, *call.arguments, **keywords)
        return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)

    def _embed(self, windows_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states in front of the first layer."""
        passing = [_Passing() for _ in self._layers]
        with self._instead(passing):
            self._run_body(windows_BT)
        self._calls[len(windows_BT)] = [cast(_Call, layer.call) for layer in passing]
        hidden_BTE = passing[0].seen
        assert hidden_BTE is not None  # noqa: S101 - the body has run
        return hidden_BTE

    def _run_body(self, windows_BT: torch.Tensor) -> torch.Tensor:
        body = getattr(self._decoder, self._decoder.base_model_prefix)
        output = body(input_ids=windows_BT, use_cache=False, shared_attention=None)
        return cast(torch.Tensor, output.last_hidden_state)

    @contextmanager
    def _instead(self, others: Sequence[nn.Module]) -> Iterator[None]:
        """Put other modules in the place of the layers, and take them back."""
        kept = list(self._layers)
        try:
            for index, other in enumerate(others):
                self._layers[index] = other
            yield
        finally:
            for index, layer in enumerate(kept):
                self._layers[index] = layer


class _Passing(nn.Module):
    """Stands in a layer's place, notes what it is called with and hands hidden states on."""

    def __init__(self, instead: torch.Tensor | None = None) -> None:
        super().__init__()
        self._instead = instead
        self.seen: torch.Tensor | None = None
        self.call: _Call | None = None

    def forward(self, hidden_BTE: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.seen = hidden_BTE
        self.call = _Call(arguments, keywords)
        return hidden_BTE if self._instead is None else self._instead


class _SpilledLoans:
    """What a source lends, of all windows."""

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._tensors: tuple[SpilledTensor, SpilledTensor] | None = None
        self._how: tuple[torch.Tensor | None, float, float | None] = (None, 1.0, None)

    def write(self, rows: slice, loan: Loan) -> None:
        values = loan.query, loan.key
        if self._tensors is None:
            self._how = loan.mask, loan.scaling, loan.softcap
            query, key = (SpilledTensor((self._windows, *v.shape[1:]), v.dtype) for v in values)
            self._tensors = query, key
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.write(rows, value)

    def read(self, rows: slice) -> Loan:
        assert self._tensors is not None  # noqa: S101 - all windows went through the source
        query, key = (tensor.read(rows) for tensor in self._tensors)
        return Loan(query, key, *self._how)


@dataclass
class _WalkingAttention:
    """A `SharedAttention` of some windows, whose sources may lie behind.

    Attributes:
        loans: By layer, what sources computed in this run.
        values: By layer, sources' values, [B, N, T, D].
    """

    sources: Sequence[int]
    behind: Mapping[int, _SpilledLoans]
    rows: slice
    loans: dict[int, Loan] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

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
        loan = self.loans[layer] = Loan(query_BHSD, key_BNTD, seen, scaling, softcap)
        self.values[layer] = value_BNTD
        return loan.attend(value_BNTD)

    def follow(self, module: FollowerAttention, value_BNTD: torch.Tensor) -> torch.Tensor:
        """See `SharedAttention.follow`."""
        source = self.sources[module.layer_idx]
        loan = self.loans.get(source) or self.behind[source].read(self.rows)
        return loan.attend(value_BNTD)
