"""Reads `metadata_props` out of an ONNX file, without onnx and without opening a session.

A session would do it too, but only after it has mapped and optimised all the weights, and it
fails in its own words when the weight file is missing. Reading the few bytes first lets every
fault of a bundle be told before any work is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from echoatt_runtime.errors import DamagedBundleError

# Field numbers of ModelProto and StringStringEntryProto in onnx.proto3.
_MODEL_GRAPH: Final = 7
_MODEL_METADATA: Final = 14
_ENTRY_KEY: Final = 1
_ENTRY_VALUE: Final = 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _WireError(Exception):
    """The bytes are not a protobuf message."""


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of the ONNX model at `path`.

    Raises:
        DamagedBundleError: The file is no ONNX model, or is cut short.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            metadata, has_graph = {}, False
            for number, start, length in _fields(file, 0, size):
                has_graph = has_graph or number == _MODEL_GRAPH
                if number == _MODEL_METADATA:
                    key, value = _read_entry(file, start, length)
                    metadata[key] = value
                file.seek(start + length)
    except (_WireError, UnicodeDecodeError) as error:
        raise DamagedBundleError(
            f"{path} is not an ONNX model, or is cut short; copy or export it again"
        ) from error
    if not has_graph:
        raise DamagedBundleError(f"{path} holds no ONNX graph; copy or export it again")
    return metadata


def _read_entry(file: BinaryIO, start: int, length: int) -> tuple[str, str]:
    texts = {_ENTRY_KEY: "", _ENTRY_VALUE: ""}
    file.seek(start)
    for number, text_start, text_length in _fields(file, start, start + length):
        file.seek(text_start)
        texts[number] = file.read(text_length).decode()
    return texts[_ENTRY_KEY], texts[_ENTRY_VALUE]


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, length) of a message; the caller may move the file."""
    position = start
    while position < end:
        file.seek(position)
        tag = _read_varint(file)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value_start = file.tell()
            _read_varint(file)
            length = file.tell() - value_start
        elif wire_type == _BYTES:
            length = _read_varint(file)
            value_start = file.tell()
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
            value_start = file.tell()
        else:
            raise _WireError
        position = value_start + length
        if tag >> 3 == 0 or position > end:
            raise _WireError
        yield tag >> 3, value_start, length


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _WireError
