"""Lets a PyTorch module compute in a precision that is not its weights'.

A wider copy of all weights would not fit beside them, so each is widened where it is multiplied
by, a slice at a time, and nothing else of the module changes. What a family computes in float32
whatever its weights are (norms, softmax) is computed in float64 where the rest is.

K inputs of a matrix product, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Elements of a weight that are widened at once: 32 MB of float64
_WIDENED_AT_ONCE = 2**22

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
_NORMS = (functional.layer_norm, functional.rms_norm)


class Precision(TorchFunctionMode):
    """Within the context, every module computes in `dtype`.

    16-bit products are summed in float32, as kernels do, and then rounded: a CPU is slow at
    anything else.

    Args:
        dtype: What every operation's result is rounded to.
        halves: Multiply by the two halves of a weight's inputs, and add the two products. It is the
            same number by another order of the sums, which rounds in another way.
    """

    def __init__(self, dtype: torch.dtype, *, halves: bool = False) -> None:
        super().__init__()
        self._dtype = dtype
        self._inside = dtype if dtype.itemsize > 2 else torch.float32
        self._halves = halves

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What torch calls for every operation."""
        kwargs = kwargs or {}
        if func is functional.embedding:
            return func(*args, **kwargs).to(self._dtype)
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm:
            bias, hidden, weight_KN = args
            return self._linear(hidden, weight_KN.T, bias)
        if func in _PRODUCTS:
            return self._product(*args)
        if func in _NORMS:
            args = tuple(self._as_wide(value) for value in args)
            kwargs = {name: self._as_wide(value) for name, value in kwargs.items()}
        elif func is torch.Tensor.float and isinstance(args[0], nn.Parameter):
            # A norm that adds 1 to its weight does it in the wider precision too
            return args[0].to(self._inside)
        elif args and self._holds(args[0]):
            if func is torch.Tensor.float and self._dtype.itemsize > torch.float32.itemsize:
                return args[0]
            args = tuple(self._not_narrower(value) for value in args)
            kwargs = {name: self._not_narrower(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _holds(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == self._dtype

    def _as_wide(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, torch.Tensor) else value

    def _not_narrower(self, value: Any) -> Any:
        """An argument, but for a dtype that would round what is computed in a wider one."""
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return value if value.itemsize >= self._dtype.itemsize else self._dtype
        return value

    def _product(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if not self._holds(one) and not self._holds(other):
            return torch.matmul(one, other)
        return torch.matmul(one.to(self._inside), other.to(self._inside)).to(self._dtype)

    def _linear(
        self, hidden: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = weight_NK.shape[1]
        rows = max(1, _WIDENED_AT_ONCE // inputs)
        narrow = weight_NK.dtype != self._inside
        slices = torch.split(weight_NK, rows) if narrow else (weight_NK,)
        middle = inputs // 2 if self._halves else inputs
        wide = hidden.to(self._inside)
        parts = []
        for slice_nK in slices:
            slice_nK = slice_nK.to(self._inside)  # the narrow one is not needed
            part = functional.linear(wide[..., :middle], slice_nK[:, :middle]).to(self._dtype)
            if self._halves:
                rest = functional.linear(wide[..., middle:], slice_nK[:, middle:])
                part = part + rest.to(self._dtype)
            parts.append(part)
        product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return product if bias is None else product + bias.to(self._dtype)
