"""A bundle's weights in a CUDA device's memory, once for all sessions."""

from __future__ import annotations

from typing import Final

import numpy as np

from echoatt_runtime.bundle import Bundle, read_onnx_file
from echoatt_runtime.contract import ELEMENT_TYPES
from echoatt_runtime.errors import OutOfMemoryError
from echoatt_runtime.executor.alignment import aligned
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.ort import LentTensor, LentWeights

_PIECE: Final = 64 << 20


def put_on_device(bundle: Bundle) -> LentWeights:
    """Copy what the graph reads of the weight file to the device.

    Args:
        bundle: A bundle whose files were checked.

    Raises:
        OutOfMemoryError: There is no room for it.
        DeviceError: The device failed, or its library did not load.
    """
    types = {elements.onnx: elements for elements in ELEMENT_TYPES.values()}
    known = [t for t in read_onnx_file(bundle.model).external if t.element_type in types]
    # Several tensors may be the same bytes
    spans: dict[int, int] = {}
    for t in known:
        spans[t.offset] = max(t.length or 0, spans.get(t.offset, 0))
    places: dict[int, int] = {}
    end = 0
    for offset, length in spans.items():
        places[offset] = end
        end += aligned(length)
    try:
        memory = CudaMemory(end)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"there is no memory left on cuda to load {bundle.model}, whose weights take {end:,}"
            " bytes; close what else uses it, or export with a smaller --dtype"
        ) from error
    file = np.memmap(bundle.weights, np.uint8, "r") if end else np.zeros(0, np.uint8)
    for offset, length in spans.items():
        for begin in range(0, length, _PIECE):
            piece = file[offset + begin : offset + min(begin + _PIECE, length)]
            memory.write(places[offset] + begin, piece)
    tensors = {
        t.name: LentTensor(memory.address + places[t.offset], types[t.element_type], t.dims)
        for t in known
    }
    return LentWeights(tensors, memory)
