"""Memory of a CUDA device, lent to ONNX Runtime as a tensor.

A session takes weights that it does not own through DLPack only.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from echoatt_runtime.contract import ElementType

# dlpack.h: DLDeviceType, and by element type DLDataTypeCode and bits
_CUDA: Final = 2
_TYPES: Final = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "uint8": (1, 8),
    "int8": (0, 8),
    "int64": (0, 64),
}
_NAME: Final = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("number", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor: the tensor's fields, then those of its owner."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("rank", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("owner", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class LentTensor:
    """A tensor on the device.

    Attributes:
        address: Where it begins, for the device.
        elements: What is in it.
        dims: Its dimensions.
    """

    address: int
    elements: ElementType
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LentWeights:
    """Weights on the device that several sessions read. A session keeps them alive.

    Attributes:
        tensors: By their names in the graph.
        owner: What the memory lives as long as.
    """

    tensors: Mapping[str, LentTensor]
    owner: object


def lend(ort: ModuleType, tensor: LentTensor) -> tuple[Any, Any]:
    """ONNX Runtime's value of a tensor, and what has to live as long."""
    dims = (ctypes.c_int64 * max(1, len(tensor.dims)))(*tensor.dims)
    code, bits = _TYPES[tensor.elements.name]
    # It has to be called something when the value goes, and nothing is to be done: this takes a
    # number, does nothing with it, and outlives the interpreter
    nothing = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)
    managed = _ManagedTensor(
        tensor.address, _Device(_CUDA, 0), len(tensor.dims), _Type(code, bits, 1)
    )
    managed.shape = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = nothing
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.addressof(managed), _NAME, None)
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    return ort.OrtValue(state.OrtValue.from_dlpack(capsule, False)), (managed, dims)
