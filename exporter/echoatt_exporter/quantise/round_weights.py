"""Rounds the weights of a student, in place, to what its quantised bundle will hold.

A rounded weight stays a float tensor, on levels of few bits in blocks: packing it is the graph's
part. So whatever runs the student afterwards, the parity gate above all, runs the bundle's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.families.projections import is_projection, weight_out_in
from echoatt_exporter.quantise.block_quantizer import dequantize_blocks, quantize_blocks
from echoatt_exporter.quantise.compensate import Inputs, round_compensated
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Bits, Quantisation
from echoatt_runtime.errors import NumericalError

OnRounded = Callable[[int, int], None]
_Forward = Callable[[torch.Tensor], torch.Tensor]
_Round = Callable[[torch.Tensor, Bits, int], torch.Tensor]


@torch.no_grad()
def round_to_nearest(
    student: EchoAttForCausalLM, quantisation: Quantisation, on_weight: OnRounded
) -> None:
    """Round every projection and the table of embeddings to the nearest levels, in place.

    Args:
        student: On the CPU, in float32.
        quantisation: To how many bits.
        on_weight: Told (weights rounded, weights in all).
    """
    head = student.get_output_embeddings()
    projections = _projections(student)
    for done, (name, module) in enumerate(projections.items()):
        on_weight(done, len(projections))
        if module is not head:
            bits, size = quantisation.bits_of(name), quantisation.block_size
            replace_weight(module, nearest(weight_out_in(module), bits, size))
    _round_tables(student, quantisation, nearest)


@torch.no_grad()
def round_calibrated(
    student: EchoAttForCausalLM,
    quantisation: Quantisation,
    windows_WS: torch.Tensor,
    on_weight: OnRounded,
) -> None:
    """Round every projection by what that does on calibration text, in place.

    The text runs once, in two copies side by side: one meets the weights as they were, the other
    the rounded ones. Each projection is rounded when the text first reaches it, so that it can make
    up for what all in front of it lost. Of a family no more is assumed than that it runs.

    Args:
        student: On the CPU, in float32 and in evaluation mode.
        quantisation: To how many bits.
        windows_WS: The text, int64.
        on_weight: Told (weights rounded, weights in all).
    """
    head = student.get_output_embeddings()
    projections = _projections(student)
    both = _BothCopies(quantisation, on_weight, len(projections))
    with ExitStack() as stack:
        for name, module in projections.items():
            forward = both.stopping if module is head else both.rounding(name, module)
            stack.enter_context(_forward_as(module, forward))
        hook = student.get_input_embeddings().register_forward_hook(both.round_rows)
        stack.callback(hook.remove)
        stack.enter_context(suppress(_HeadReached))
        student(input_ids=windows_WS.repeat(2, 1), use_cache=False)

    def compensated(weight_NK: torch.Tensor, bits: Bits, block_size: int) -> torch.Tensor:
        return round_compensated(weight_NK, both.inputs(), bits, block_size)

    _round_tables(student, quantisation, compensated)


def has_shared_table(student: EchoAttForCausalLM) -> bool:
    """Whether the LM head is the table of embeddings, or a copy of it."""
    head, table = (module.weight for module in tables_of(student))
    return head is table or (head.shape == table.shape and torch.equal(head, table))


def _round_tables(
    student: EchoAttForCausalLM,
    quantisation: Quantisation,
    round_head: _Round,
) -> None:
    """Round LM head and table of embeddings: once if they are the same, else the table plainly."""
    head, embedding = tables_of(student)
    shared, size = has_shared_table(student), quantisation.block_size
    rounded_VE = round_head(head.weight, quantisation.head_bits, size)
    if not shared:
        table_VE = nearest(embedding.weight, quantisation.embedding_bits, size)
        replace_weight(embedding, table_VE)
    replace_weight(head, rounded_VE)
    if shared:
        embedding.weight = head.weight


def _projections(student: EchoAttForCausalLM) -> dict[str, nn.Linear | Conv1D]:
    """Every projection by its name in the decoder, which is its name in the checkpoint."""
    modules = student.decoder.named_modules()
    return {name: module for name, module in modules if is_projection(module)}


def tables_of(student: EchoAttForCausalLM) -> tuple[nn.Linear, nn.Embedding]:
    """The LM head and the table of embeddings."""
    tables = student.get_output_embeddings(), student.get_input_embeddings()
    return cast(tuple[nn.Linear, nn.Embedding], tables)


class _HeadReached(Exception):  # noqa: N818 - it is an outcome, not an error
    """Calibration text has gone through all layers."""


class _BothCopies:
    """Runs the first half of a batch with exact weights and the second with rounded ones."""

    def __init__(self, quantisation: Quantisation, on_weight: OnRounded, count: int) -> None:
        self._quantisation = quantisation
        self._on_weight = on_weight
        self._count = count
        self._done = 0
        # Projections of one input need what is known of it only once
        self._hidden: torch.Tensor | None = None
        self._inputs: Inputs | None = None

    def rounding(self, name: str, module: nn.Linear | Conv1D) -> _Forward:
        """A projection's forward that rounds its weight between the two halves."""
        own: _Forward = module.forward

        def forward(hidden_BSK: torch.Tensor) -> torch.Tensor:
            exact_BSK, rounded_BSK = hidden_BSK.chunk(2)
            exact_BSN = own(exact_BSK)
            bits, size = self._quantisation.bits_of(name), self._quantisation.block_size
            inputs = self.inputs(hidden_BSK)
            replace_weight(module, round_compensated(weight_out_in(module), inputs, bits, size))
            return torch.cat([exact_BSN, own(rounded_BSK)])

        return forward

    def stopping(self, hidden_BSK: torch.Tensor) -> torch.Tensor:
        """The LM head's forward, which keeps what it needs and computes nothing."""
        self.inputs(hidden_BSK)
        raise _HeadReached

    def inputs(self, hidden_BSK: torch.Tensor | None = None) -> Inputs:
        """What is known of some inputs; of the last ones, if none are given."""
        if hidden_BSK is not None:
            self._on_weight(self._done, self._count)
            self._done += 1
            if hidden_BSK is not self._hidden:
                check_numbers(hidden_BSK)
                exact, rounded = hidden_BSK.flatten(0, 1).chunk(2)
                self._hidden, self._inputs = hidden_BSK, Inputs.of(exact, rounded)
        assert self._inputs is not None  # noqa: S101 - the text runs through projections
        return self._inputs

    def round_rows(self, _module: nn.Module, _arguments: Any, rows_BSE: torch.Tensor) -> Any:
        """Round the second half of what was looked up, as the table will be.

        A family may have scaled the rows; blocks are rounded alike at every scale.
        """
        exact, rows = rows_BSE.chunk(2)
        bits, size = self._quantisation.embedding_bits, self._quantisation.block_size
        return torch.cat([exact, nearest(rows.flatten(0, 1), bits, size).view_as(rows)])


def check_numbers(values: torch.Tensor) -> None:
    """Refuse to go by what a broken model computes.

    Raises:
        NumericalError: A value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise NumericalError(
            "PyTorch itself computes values that are NaN or infinite on calibration text, so"
            " nothing can be learned from it; see whether the checkpoint's weights are whole"
        )


def nearest(weight_NK: torch.Tensor, bits: Bits, block_size: int) -> torch.Tensor:
    """A weight at the nearest levels of its blocks, float32 [N, K]."""
    blocks = quantize_blocks(weight_NK.detach().T.numpy(), bits, block_size)
    rounded_NK = torch.from_numpy(dequantize_blocks(blocks, bits))
    # The last block is padded where K is not a whole number of blocks
    return rounded_NK[:, : weight_NK.shape[1]].contiguous()


def replace_weight(module: nn.Module, weight_NK: torch.Tensor) -> None:
    """Give a projection, or a table of rows, another weight."""
    own = weight_NK.T.contiguous() if isinstance(module, Conv1D) else weight_NK
    module.weight = nn.Parameter(own, requires_grad=False)


@contextmanager
def _forward_as(module: nn.Module, forward: _Forward) -> Iterator[None]:
    """Let a module's forward be another one within the context."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
