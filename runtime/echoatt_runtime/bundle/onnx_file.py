"""Reads what is to be known of an ONNX file before a session is opened, without onnx.

A session would only tell after it has mapped and optimised all the weights, fails in its own words
when the weight file is missing, and follows the file's own paths to weights. Reading the few bytes
first lets every fault of a bundle be told before any work is done.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from echoatt_runtime.errors import DamagedBundleError

# Field numbers of onnx.proto3
_MODEL_GRAPH: Final = 7
_MODEL_METADATA: Final = 14
_MODEL_FUNCTIONS: Final = 25
_NODE_OPERATOR: Final = 4
_ENTRY_KEY: Final = 1
_ENTRY_VALUE: Final = 2
_TENSOR_DIMS: Final = 1
_TENSOR_TYPE: Final = 2
_TENSOR_NAME: Final = 8
_TENSOR_EXTERNAL: Final = 13
_TENSOR_LOCATION: Final = 14
# Where a message holds tensors, or messages that do: of a graph its nodes, initializers and sparse
# initializers; of a node its attributes; of an attribute its tensors, graphs and sparse tensors; of
# a sparse tensor its values and indices; of a function its nodes.
_PATHS: Final = {
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
}
# Deeper than any graph of ours; each level is a branch inside a branch
_DEEPEST: Final = 64

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _WireError(Exception):
    """The bytes are not a protobuf message."""


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor whose elements are in another file.

    Attributes:
        name: Of the tensor.
        element_type: ONNX's number of it.
        dims: Its dimensions.
        location: The file, as the model names it.
        offset: Where in the file it begins.
        length: Bytes; None if the model does not say.
    """

    name: str
    element_type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What is read of a model file.

    Attributes:
        metadata: Its `metadata_props`.
        external: Every tensor in it whose elements are elsewhere.
        operators: Names of the operators in it.
        graph_sha256: Hash of its graph's bytes.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    external: tuple[ExternalTensor, ...] = ()
    operators: frozenset[str] = frozenset()
    graph_sha256: str = ""


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of the ONNX model at `path`, and nothing else.

    Raises:
        DamagedBundleError: The file is no ONNX model, or is cut short.
    """
    return _read(path, whole=False).metadata


def read_onnx_file(path: Path) -> OnnxFile:
    """Read metadata, external tensors, operators and the graph's hash of the model at `path`.

    Raises:
        DamagedBundleError: The file is no ONNX model, or is cut short.
    """
    return _read(path, whole=True)


def _read(path: Path, *, whole: bool) -> OnnxFile:
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _WireError
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data, whole=whole)
    except (_WireError, UnicodeDecodeError, ValueError) as error:
        raise DamagedBundleError(
            f"{path} is not an ONNX model, or is cut short; copy or export it again"
        ) from error
    except OSError as error:
        raise DamagedBundleError(f"{path} cannot be read ({error.strerror})") from error


def _parse(data: mmap.mmap, *, whole: bool) -> OnnxFile:
    metadata: dict[str, str] = {}
    external: list[ExternalTensor] = []
    operators: set[bytes] = set()
    digest = hashlib.sha256()
    graphs = 0
    for number, start, end in _fields(data, 0, len(data)):
        if number == _MODEL_METADATA:
            key, value = _entry(data, start, end)
            if key in metadata:
                raise _WireError
            metadata[key] = value
        elif number == _MODEL_GRAPH:
            graphs += 1
            if whole:
                digest.update(data[start:end])
                external += _external(data, "graph", start, end, 0, operators)
        elif number == _MODEL_FUNCTIONS and whole:
            external += _external(data, "function", start, end, 0, operators)
    # A second graph would be merged into the first, and hashed apart from it
    if graphs != 1:
        raise _WireError
    names = frozenset(name.decode() for name in operators)
    return OnnxFile(metadata, tuple(external), names, digest.hexdigest())


def _external(
    data: mmap.mmap, kind: str, start: int, end: int, depth: int, operators: set[bytes]
) -> Iterator[ExternalTensor]:
    """Every external tensor below a message; adds the operators of its nodes on the way."""
    if depth > _DEEPEST:
        raise _WireError
    if kind == "tensor":
        yield from _tensor(data, start, end)
        return
    inside = _PATHS[kind]
    for number, begin, stop in _fields(data, start, end):
        if number in inside:
            yield from _external(data, inside[number], begin, stop, depth + 1, operators)
        elif kind == "node" and number == _NODE_OPERATOR:
            operators.add(data[begin:stop])


def _tensor(data: mmap.mmap, start: int, end: int) -> Iterator[ExternalTensor]:
    entries: dict[str, str] = {}
    dims: list[int] = []
    name, element_type, is_external = "", 0, False
    for number, begin, stop in _fields(data, start, end):
        if number == _TENSOR_EXTERNAL:
            key, value = _entry(data, begin, stop)
            entries[key] = value
            is_external = True
        elif number == _TENSOR_LOCATION:
            is_external = is_external or _varint(data, begin, stop)[0] == 1
        elif number == _TENSOR_TYPE:
            element_type = _varint(data, begin, stop)[0]
        elif number == _TENSOR_NAME:
            name = data[begin:stop].decode()
        elif number == _TENSOR_DIMS:
            dims += _varints(data, begin, stop)
    if is_external:
        length = entries.get("length")
        yield ExternalTensor(
            name,
            element_type,
            tuple(dims),
            entries.get("location", ""),
            int(entries.get("offset", "0")),
            None if length is None else int(length),
        )


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    texts = {_ENTRY_KEY: "", _ENTRY_VALUE: ""}
    for number, begin, stop in _fields(data, start, end):
        texts[number] = data[begin:stop].decode()
    return texts[_ENTRY_KEY], texts[_ENTRY_VALUE]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, start, end) of a message's fields."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        wire_type = tag & 7
        if wire_type == _VARINT:
            stop = _varint(data, position, end)[1]
        elif wire_type == _BYTES:
            length, position = _varint(data, position, end)
            stop = position + length
        elif wire_type in (_FIXED32, _FIXED64):
            stop = position + (4 if wire_type == _FIXED32 else 8)
        else:
            raise _WireError
        if tag >> 3 == 0 or stop > end:
            raise _WireError
        yield tag >> 3, position, stop
        position = stop


def _varints(data: mmap.mmap, start: int, end: int) -> Iterator[int]:
    """Numbers one after the other, packed or alone, signed as in int64."""
    while start < end:
        value, start = _varint(data, start, end)
        yield value - 2**64 if value >= 2**63 else value


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _WireError
