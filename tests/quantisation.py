"""A quantisation for tests of passes, which need not know how weights were rounded."""

from __future__ import annotations

from echoatt_runtime.contract import Bits, Quantisation


def to_nearest(bits: Bits) -> Quantisation:
    """Everything at so many bits."""
    return Quantisation(
        rounding="nearest", block_size=32, bits=bits, head_bits=bits, embedding_bits=bits
    )
