"""Element types of tensors and the dtypes of bundles: the one table of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class ElementType:
    """What the elements of a tensor are.

    Attributes:
        name: As numpy, torch and the manifest call it, such as "float32".
        onnx: Its number in ONNX's `TensorProto.DataType`.
        tensor: What ONNX Runtime calls a tensor of it, such as "tensor(float)".
        host: The numpy type that holds such an element on the host. numpy has no bfloat16: its bits
            are moved as uint16.
    """

    name: str
    onnx: int
    tensor: str
    host: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Size of an element."""
        return self.host.itemsize


def _table(*rows: tuple[str, int, str, Any]) -> Mapping[str, ElementType]:
    return MappingProxyType(
        {
            name: ElementType(name, number, f"tensor({tensor})", np.dtype(host))
            for name, number, tensor, host in rows
        }
    )


ELEMENT_TYPES: Final = _table(
    ("float32", 1, "float", np.float32),
    ("uint8", 2, "uint8", np.uint8),
    ("int8", 3, "int8", np.int8),
    ("int64", 7, "int64", np.int64),
    ("float16", 10, "float16", np.float16),
    ("bfloat16", 16, "bfloat16", np.uint16),
)


@dataclass(frozen=True, slots=True)
class Dtype:
    """What `--dtype` of an export names.

    Attributes:
        name: "fp32", "fp16", "bf16", "int8" or "int4".
        compute: Element type of activations and caches on a CPU.
        bits: Bits of a weight where weights are quantised in blocks; None where they are not.
    """

    name: str
    compute: ElementType
    bits: Literal[4, 8] | None

    def compute_on(self, device: str) -> ElementType:
        """Element type of activations and caches in a bundle for a device.

        CUDA has fast products with quantised weights for 16-bit activations only.
        """
        if device == "cuda" and self.bits is not None:
            return ELEMENT_TYPES["float16"]
        return self.compute


DTYPES: Final[Mapping[str, Dtype]] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            Dtype("fp32", ELEMENT_TYPES["float32"], None),
            Dtype("fp16", ELEMENT_TYPES["float16"], None),
            Dtype("bf16", ELEMENT_TYPES["bfloat16"], None),
            Dtype("int8", ELEMENT_TYPES["float32"], 8),
            Dtype("int4", ELEMENT_TYPES["float32"], 4),
        )
    }
)
