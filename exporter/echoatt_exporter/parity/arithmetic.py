"""Lets a PyTorch module compute with other weights than its own, one module at a time.

Both uses would otherwise need a second copy of all weights: float32 arithmetic on 16-bit weights,
and weights that went through the block quantiser.

K inputs of a matrix product, N outputs, J blocks of K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from echoatt_exporter.families.projections import is_projection
from echoatt_exporter.quantise.block_quantizer import BLOCK_SIZE, quantize_blocks, zero_level

_Replace = Callable[[str, torch.Tensor], torch.Tensor]


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Let a 16-bit `model` compute in float32, within the context.

    The weights keep their 16-bit values. This is what a 16-bit bundle is held against: PyTorch's
    own 16-bit arithmetic would add rounding errors as large as the bundle's, and on a CPU its
    matrix products of more than one row are far slower than the conversion.
    """
    sizes = [p.numel() for p in model.parameters() if p.dtype != torch.float32]
    # One buffer for all: fresh memory for every weight costs more than the conversion itself
    scratch = torch.empty(max(sizes, default=0), dtype=torch.float32)

    def widen(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name != "weight":
            return weight.float()
        return scratch[: weight.numel()].view(weight.shape).copy_(weight)

    with ExitStack() as stack:
        for module in model.modules():
            if not any(p.dtype != torch.float32 for p in module.parameters(recurse=False)):
                continue
            if isinstance(module, nn.Embedding):
                # The rows that are looked up are converted, not the table. A family that scales
                # them does it in 16 bits, as in the bundle.
                stack.callback(module.register_forward_hook(_widen_output).remove)
            else:
                stack.enter_context(_replaced(module, widen))
        yield


@contextmanager
def quantised_weights(model: nn.Module, bits: Literal[4, 8]) -> Iterator[None]:
    """Let `model` multiply by weights rounded to `bits`, as in a bundle, within the context.

    Every projection is quantised, the LM head too; a tied embedding table is not.
    """

    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name != "weight":
            return weight
        return torch.from_numpy(round_trip(weight.numpy(force=True), bits))

    def rounded_transposed(name: str, weight: torch.Tensor) -> torch.Tensor:
        return rounded(name, weight.T).T if name == "weight" else weight

    with ExitStack() as stack:
        for module in model.modules():
            if is_projection(module):
                replace = rounded if isinstance(module, nn.Linear) else rounded_transposed
                stack.enter_context(_replaced(module, replace))
        yield


def round_trip(weight_NK: npt.NDArray[np.float32], bits: Literal[4, 8]) -> npt.NDArray[np.float32]:
    """Quantise a weight as the QuantizeWeights pass does; give what it then stands for."""
    packed, scales_NJ = quantize_blocks(weight_NK.T, bits, BLOCK_SIZE)
    N, J, _ = packed.shape
    levels_NJX = _unpack(packed.reshape(N, -1), bits).reshape(N, J, BLOCK_SIZE)
    rounded_NK = ((levels_NJX - zero_level(bits)) * scales_NJ[..., None]).reshape(N, -1)
    # The last block is padded where K is not a whole number of blocks
    return rounded_NK[:, : weight_NK.shape[1]]


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.float32]:
    """Bytes [N, n] to one number each, or two with the low half first."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return packed.astype(np.float32)


def _widen_output(_module: nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


@contextmanager
def _replaced(module: nn.Module, replace: _Replace) -> Iterator[None]:
    """Replace a module's own parameters whenever it runs, and put them back right after."""
    own: dict[str, nn.Parameter | None] = {}

    def before(_module: nn.Module, _arguments: Any) -> None:
        own.update(module._parameters)  # noqa: SLF001  # torch has no other way to lend one
        for name, weight in own.items():
            if weight is not None:
                # Not an nn.Parameter: it must not be found by anything that lists those
                lent = replace(name, weight)
                module._parameters[name] = lent  # type: ignore[assignment]  # noqa: SLF001

    def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        module._parameters.update(own)  # noqa: SLF001
        own.clear()

    hooks = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
