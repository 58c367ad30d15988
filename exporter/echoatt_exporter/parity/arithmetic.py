"""Lets a PyTorch module compute with weights that went through the block quantiser.

They are lent to one module at a time: all of them would be a second copy of the model.

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
