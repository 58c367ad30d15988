"""Runs a bundle's graph, one step at a time, over rows of a cache.

Shapes: B batch, S new tokens, n wanted logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache import KVCache, Memory, bucket_capacity
from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import ContextOverflowError
from echoatt_runtime.executor.bind_caches import bind_caches
from echoatt_runtime.executor.decoding import Decoding
from echoatt_runtime.executor.interface import check_interface
from echoatt_runtime.executor.step_arrays import Integers, Logits, StepArrays, StepRoom
from echoatt_runtime.executor.top_rows import MOST_TOP, TopLogits, TopRows
from echoatt_runtime.ort import Binding, OrtSession


@dataclass(slots=True)
class _Bound:
    """What of a cache is bound, and with which arrays."""

    binding: Binding
    layout: int = -1
    rows: tuple[int, int] = (0, 0)
    arrays: StepArrays | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The most probable next token of each row.

    Attributes:
        token_ids: [B].
        finite: Whether a row's logits are numbers, [B]; where they are not its token means nothing.
    """

    token_ids: Integers
    finite: npt.NDArray[np.bool_]


class Executor:
    """A graph on one device. Several caches may be used with one executor.

    Attributes:
        specification: What the graph computes.
        session: The graph, for what it took and for profiles.
        decoding: What runs single tokens; None where the session does.
        extra: By name the extra outputs of the last run, as they came.
    """

    def __init__(
        self,
        session: OrtSession,
        specification: Specification,
        memory: Memory,
        extra_outputs: Sequence[str] = (),
        decoding: Decoding | None = None,
    ) -> None:
        """Take a graph.

        Args:
            session: The graph.
            specification: What it computes.
            memory: Any memory of the session's device.
            extra_outputs: Outputs behind those of the contract, which are given out too.
            decoding: What runs single tokens in place of the session.

        Raises:
            DamagedBundleError: The graph is not as specified.
        """
        check_interface(session, specification, extra_outputs)
        self.specification = specification
        self.session = session
        self.extra: dict[str, npt.NDArray[Any]] = {}
        self._extra_outputs = tuple(extra_outputs)
        self._memory = memory
        self.decoding = decoding
        self._top_rows: TopRows | None = None
        self._bound: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()

    @property
    def device(self) -> str:
        """Where the graph runs, "cpu" or "cuda"."""
        return self.session.device

    def new_cache(self, slots: int, tokens: int, limit: int | None = None) -> KVCache:
        """Allocate zeroed caches.

        Args:
            slots: Rows that there is room for.
            tokens: Tokens that each row has room for, at least; `KVCache.reserve` makes more.
            limit: Most tokens that a row will ever hold; None stands for the context.

        Raises:
            ContextOverflowError: `tokens` is over the limit.
            OutOfMemoryError: There is no memory left.
        """
        if limit is None:
            limit = self.specification.context_length
        capacity = bucket_capacity(tokens, limit)
        return KVCache(self.specification.caches, self._memory, slots, capacity, limit)

    def run(
        self,
        cache: KVCache,
        token_ids: Integers,
        past_lengths: Integers,
        logits_indices: Integers,
        first_slot: int = 0,
        free_behind: int = 0,
    ) -> Logits:
        """Run new tokens through the model and write them into the cache.

        Rows may be padded on the right with any token: the caller passes past lengths that do not
        count the pads, and later tokens overwrite them.

        Args:
            cache: Of this executor.
            token_ids: New tokens of B slots, [B, S].
            past_lengths: Valid tokens of each row before these, [B].
            logits_indices: Positions among the new tokens whose logits are wanted, [B, n].
            first_slot: The slot of the first row; the others follow.
            free_behind: Slots behind the last row's that hold nothing, and may be written into.

        Returns:
            The logits, [B, n, V], float32, in memory of their own.

        Raises:
            ContextOverflowError: The cache has no room for the new tokens.
            OutOfMemoryError: There is no room for what the graph computes.
            DeviceError: The device failed.
            RunError: ONNX Runtime refuses the step.
        """
        arrays, is_kept = self._step(
            cache, token_ids, past_lengths, logits_indices, first_slot, free_behind
        )
        logits = arrays.logits(len(token_ids))
        return logits.copy() if is_kept and self.device == "cpu" else logits

    def choose(
        self,
        cache: KVCache,
        token_ids: Integers,
        past_lengths: Integers,
        logits_indices: Integers,
        first_slot: int = 0,
        free_behind: int = 0,
    ) -> Choice:
        """Run as `run` does, and choose the most probable token of each row.

        Args:
            cache: As in `run`.
            token_ids: As in `run`.
            past_lengths: As in `run`.
            logits_indices: The position that is wanted of each row, [B, 1].
            first_slot: As in `run`.
            free_behind: As in `run`.
        """
        arrays, _ = self._step(
            cache, token_ids, past_lengths, logits_indices, first_slot, free_behind
        )
        if self.specification.choice_names:
            chosen, sums = arrays.choices(len(token_ids))
            if np.isfinite(sums).all():
                return Choice(chosen[:, 0], np.ones(len(chosen), np.bool_))
        # Also where a logit is none, to see whose
        logits_BV = arrays.logits(len(token_ids))[:, 0]
        # NaN is the largest of all to argmax
        chosen = logits_BV.argmax(axis=1)
        finite = np.isfinite(logits_BV[np.arange(len(chosen)), chosen])
        return Choice(chosen, finite)

    @property
    def most_top(self) -> int:
        """How many of the most probable tokens `top` gives; 0 where the logits are near enough."""
        return MOST_TOP if self.device != "cpu" and self.specification.choice_names else 0

    def top(
        self,
        cache: KVCache,
        token_ids: Integers,
        past_lengths: Integers,
        logits_indices: Integers,
        first_slot: int = 0,
        free_behind: int = 0,
        *,
        number: int,
    ) -> TopLogits | None:
        """Run as `run` does, and give the most probable tokens of each row.

        Args:
            cache: As in `run`.
            token_ids: As in `run`.
            past_lengths: As in `run`.
            logits_indices: The position that is wanted of each row, [B, 1].
            first_slot: As in `run`.
            free_behind: As in `run`.
            number: How many of them, at most `most_top`.

        Returns:
            Them, with a few more; None where it takes the whole logits to tell, which `run` gives.
        """
        arrays, _ = self._step(
            cache, token_ids, past_lengths, logits_indices, first_slot, free_behind
        )
        _, sums = arrays.choices(len(token_ids))
        if not np.isfinite(sums).all():
            return None
        if self._top_rows is None:
            self._top_rows = TopRows(self.device, self._memory, self.specification.vocab_size)
        return self._top_rows.find(arrays.logits_address, len(token_ids), number)

    def _step(
        self,
        cache: KVCache,
        token_ids: Integers,
        past_lengths: Integers,
        logits_indices: Integers,
        first_slot: int,
        free_behind: int,
    ) -> tuple[StepArrays, bool]:
        """Run; gives the arrays, and whether the next call uses them again."""
        B, S = token_ids.shape
        needed = int(past_lengths.max()) + S
        if needed > cache.capacity or first_slot + B > cache.slots:
            raise ContextOverflowError(
                f"{B} rows of {needed} tokens from slot {first_slot} do not fit a cache of"
                f" {cache.slots} slots of {cache.capacity}; call its reserve first"
            )
        if self.decoding is not None and S == logits_indices.shape[1] == 1:
            return self.decoding.step(cache, token_ids, past_lengths, first_slot, free_behind), True
        bound = self._bind(cache, first_slot, B)
        arrays, shape = bound.arrays, (B, S, logits_indices.shape[1])
        if arrays is None or arrays.shape != shape:
            room = StepRoom.of(self._memory, shape, self.specification)
            arrays = StepArrays(bound.binding, self.device, room, shape, self.specification)
        # Only decoding comes back with the same shapes, and its logits are small to copy
        bound.arrays = arrays if S == 1 else None
        arrays.fill(token_ids, past_lengths, logits_indices)
        for name in self._extra_outputs:
            # Anew, for their size changes from call to call
            bound.binding.bind_open_output(name)
        self.session.run(bound.binding)
        self.extra = {name: bound.binding.read_open_output(name) for name in self._extra_outputs}
        return arrays, bound.arrays is not None

    def _bind(self, cache: KVCache, first_slot: int, count: int) -> _Bound:
        """The binding in which these slots of a cache are bound."""
        bound = self._bound.get(cache)
        if bound is None:
            bound = self._bound[cache] = _Bound(self.session.new_binding())
        rows = first_slot, count
        if (bound.layout, bound.rows) != (cache.layout, rows):
            bind_caches(bound.binding, self.device, cache, first_slot, count)
            bound.layout, bound.rows = cache.layout, rows
        return bound
