"""The key/value cache: buffers that the graph updates in place, and that grow in buckets.

Every cache is one ONNX Runtime value, bound to the graph's input and to its output, so that
TensorScatter writes the new tokens where they stay and a step copies nothing.

Shapes: B batch, N key/value heads, T capacity in tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from echoatt_runtime.contract.manifest import Manifest, capacity_axis
from echoatt_runtime.errors import ContextOverflowError
from echoatt_runtime.executor.step_buffers import StepBuffers
from echoatt_runtime.ort import import_onnxruntime

BUCKET: Final = 256
# A values' row is as long as the capacity. Rows a multiple of 4 KB apart fall into the same few
# sets of a CPU's cache: a layer's context took 471 us at 4,096 tokens and 373 at 4,112. Capacities
# are multiples of this, a cache line, and never of a bucket.
_LINE: Final = 16
_LARGEST_STEP_FRACTION: Final = 16

# ONNX element type numbers, and the numpy type that holds such an element on the host: numpy has
# no bfloat16, and here its bits are only moved.
_ONNX_TYPES: Final = {"float32": 1, "float16": 10, "bfloat16": 16}
_HOST_TYPES: Final = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}

HostArray = npt.NDArray[Any]


def bucket_capacity(tokens: int, limit: int) -> int:
    """The capacity to allocate for `tokens` tokens.

    Steps are 256 tokens, because the graph reads a whole buffer at every step, and from 4,096
    tokens a sixteenth, because growing copies a whole buffer; the last step ends at the limit.

    Args:
        tokens: That a row must have room for.
        limit: Most tokens that a row will ever hold: the context, or less where that is known.

    Raises:
        ContextOverflowError: `tokens` is over the limit.
    """
    largest = _round_up(limit, _LINE)
    largest += _LINE if largest % BUCKET == 0 else 0
    if tokens > largest:
        raise ContextOverflowError(
            f"a cache of {tokens} tokens does not fit the limit of {limit}; shorten the prompt"
        )
    even = max(1, tokens - _LINE)
    step = max(BUCKET, _round_up(even // _LARGEST_STEP_FRACTION, BUCKET))
    return min(_round_up(even, step) + _LINE, largest)


class HostBuffer:
    """One cache in the host's memory; ONNX Runtime's value is the numpy array's own memory.

    Attributes:
        value: The `onnxruntime.OrtValue`.
    """

    def __init__(self, ort: Any, host: HostArray, onnx_type: int) -> None:
        self._host = host
        self.value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(host, onnx_type)

    def to_host(self) -> HostArray:
        """The live memory."""
        return self._host


class DeviceBuffer:
    """One cache in a device's memory.

    Attributes:
        value: The `onnxruntime.OrtValue`.
    """

    def __init__(self, ort: Any, host: HostArray, onnx_type: int, device: str) -> None:
        self._ort, self._onnx_type = ort, onnx_type
        self._shape, self._host_type = host.shape, host.dtype
        self.value = ort.OrtValue.ortvalue_from_shape_and_type(host.shape, onnx_type, device, 0)
        self.value.update_inplace(HostBuffer(ort, host, onnx_type).value)

    def to_host(self) -> HostArray:
        """A copy of the memory."""
        host = np.empty(self._shape, self._host_type)
        HostBuffer(self._ort, host, self._onnx_type).value.update_inplace(self.value)
        return host


class KVCache:
    """The caches of a batch, in the order of `Manifest.cache_names`.

    Attributes:
        batch: Rows.
        capacity: Tokens that each row has room for.
        limit: Most tokens that a row will ever hold, as in `bucket_capacity`.
        binding: ONNX Runtime's IO binding in which the caches are bound.
        step_buffers: What else is bound in it, where it stays so for the next decoding step.
    """

    def __init__(
        self,
        ort_session: Any,
        manifest: Manifest,
        device: str,
        batch: int,
        capacity: int,
        limit: int,
    ) -> None:
        self._manifest = manifest
        self._device = device
        self._ort = import_onnxruntime()
        self.batch = batch
        self.capacity = capacity
        self.limit = limit
        self.binding = ort_session.io_binding()
        self.step_buffers: StepBuffers | None = None
        self._names = list(zip(manifest.past_names, manifest.present_names, strict=True))
        self._buffers = [self._allocate(self._zeros(past)) for past, _ in self._names]
        for index in range(len(self._names)):
            self._bind(index)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return self.batch * self.capacity * self._manifest.cache_bytes_per_token

    def reserve(self, tokens: int, valid: int) -> None:
        """Make room for `tokens` tokens a row; does nothing where there is room.

        Args:
            tokens: Tokens that a row must have room for.
            valid: Tokens of the longest row, which are kept; what lies behind them is not.

        Raises:
            ContextOverflowError: As in `bucket_capacity`.
        """
        if tokens > self.capacity:
            capacity = bucket_capacity(tokens, self.limit)
            self._rebuild(range(self.batch), capacity, valid)

    def select(self, rows: Sequence[int], valid: int) -> None:
        """Keep only `rows`, in that order, with the first `valid` tokens of each."""
        self._rebuild(rows, self.capacity, valid)

    def to_host(self) -> list[HostArray]:
        """The buffers, keys [B, N, T, D] and values [B, N, D, T]; bfloat16 as its bits in uint16.

        On the CPU they are the live memory, on other devices copies.
        """
        return [buffer.to_host() for buffer in self._buffers]

    def _rebuild(self, rows: Sequence[int], capacity: int, valid: int) -> None:
        self.batch, self.capacity = len(rows), capacity
        # One buffer after another, so that at most one of them exists twice.
        for index, buffer in enumerate(self._buffers):
            name, _ = self._names[index]
            old, new = buffer.to_host(), self._zeros(name)
            # Views with the tokens in front of all but the rows
            old_BTND, new_BTND = (
                np.moveaxis(array, capacity_axis(name), 1) for array in (old, new)
            )
            for new_row, old_row in enumerate(rows):
                new_BTND[new_row, :valid] = old_BTND[old_row, :valid]
            self._buffers[index] = self._allocate(new)
            self._bind(index)

    def _zeros(self, name: str) -> HostArray:
        # Attention multiplies the masked tail by zero probabilities, and zero times NaN is NaN.
        manifest = self._manifest
        shape = (self.batch, *manifest.cache_dims(name, self.capacity))
        return np.zeros(shape, _HOST_TYPES[manifest.cache_element_type])

    def _allocate(self, host: HostArray) -> HostBuffer | DeviceBuffer:
        onnx_type = _ONNX_TYPES[self._manifest.cache_element_type]
        if self._device == "cpu":
            return HostBuffer(self._ort, host, onnx_type)
        return DeviceBuffer(self._ort, host, onnx_type, self._device)

    def _bind(self, index: int) -> None:
        past_name, present_name = self._names[index]
        self.binding.bind_ortvalue_input(past_name, self._buffers[index].value)
        self.binding.bind_ortvalue_output(present_name, self._buffers[index].value)


def _round_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
