"""A graph of one operator, as bytes: the largest logits of each row.

It is written here by hand, for nothing at run time can write a graph.
"""

from __future__ import annotations

from echoatt_runtime.contract import ELEMENT_TYPES

TOP_LOGITS_INPUT, TOP_LOGITS, TOP_TOKENS = "logits", "top_logits", "top_tokens"

_IR_VERSION, _OPSET = 10, 24


def top_model(vocab_size: int, number: int) -> bytes:
    """A model of [B, V] float32 logits, that gives the largest and where they are, both [B, k].

    They come largest first.

    Args:
        vocab_size: V.
        number: How many, k.
    """
    integers, floats = ELEMENT_TYPES["int64"].onnx, ELEMENT_TYPES["float32"].onnx
    data = number.to_bytes(8, "little")
    k = _field(1, 1) + _field(2, integers) + _field(8, "k") + _field(9, data)
    node = (
        *(_field(1, name) for name in (TOP_LOGITS_INPUT, "k")),
        *(_field(2, name) for name in (TOP_LOGITS, TOP_TOKENS)),
        _field(4, "TopK"),
    )
    graph = (
        _field(1, b"".join(node)),
        _field(2, "top"),
        _field(5, k),
        _field(11, _value(TOP_LOGITS_INPUT, floats, vocab_size)),
        _field(12, _value(TOP_LOGITS, floats, number)),
        _field(12, _value(TOP_TOKENS, integers, number)),
    )
    opset = _field(1, "") + _field(2, _OPSET)
    return _field(1, _IR_VERSION) + _field(7, b"".join(graph)) + _field(8, opset)


def _value(name: str, element_type: int, columns: int) -> bytes:
    """ValueInfoProto of rows of a fixed length."""
    dims = _field(1, _field(2, "batch")) + _field(1, _field(1, columns))
    return _field(1, name) + _field(2, _field(1, _field(1, element_type) + _field(2, dims)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protobuf message: a number, or what has a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
