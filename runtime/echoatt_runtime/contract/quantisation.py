"""How a bundle's weights were rounded to few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from echoatt_runtime.contract import records
from echoatt_runtime.contract.records import Field

Bits = Literal[4, 8]
_BITS: Final = (4, 8)
_BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
ROUNDINGS: Final = ("calibrated", "nearest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How a bundle's weights were rounded.

    Attributes:
        rounding: "calibrated", by what it does on calibration text, or "nearest".
        block_size: Inputs that share a scale.
        bits: Of the layers' products.
        head_bits: Of the LM head.
        embedding_bits: Of the table of embeddings.
        scaled_channels: Whether what gives the products' inputs, and their weights, were scaled
            against each other so that rounded inputs lose less.
        wide: Names, in the checkpoint, of modules in the layers whose weights have 8 bits.
        text: Where calibration text came from; None without.
        tokens: Of calibration text.
        unknown: Fields that this version does not know, kept as they were read.
    """

    rounding: str
    block_size: int
    bits: Bits
    head_bits: Bits
    embedding_bits: Bits
    scaled_channels: bool = False
    wide: tuple[str, ...] = ()
    text: str | None = None
    tokens: int = 0
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def bits_of(self, name: str) -> Bits:
        """The bits of a module's weight, by the module's name in the checkpoint."""
        return 8 if name in self.wide else self.bits


def quantisation_faults(quantisation: Quantisation | None, bits: int | None) -> list[str]:
    """What is wrong with a bundle's quantisation.

    Args:
        quantisation: The bundle's.
        bits: Those that its dtype has.
    """
    if quantisation is None:
        return []
    faults = []
    if bits is None:
        faults.append("quantisation is there although the dtype is not quantised")
    elif quantisation.bits != bits:
        faults.append(f"quantisation.bits is {quantisation.bits}, and the dtype has {bits}")
    numbers = {
        name: getattr(quantisation, name) for name in ("bits", "head_bits", "embedding_bits")
    }
    faults += [
        f"quantisation.{name} is {number}, not 4 or 8"
        for name, number in numbers.items()
        if number not in _BITS
    ]
    if quantisation.block_size not in _BLOCK_SIZES:
        faults.append(f"quantisation.block_size is {quantisation.block_size}")
    if quantisation.rounding not in ROUNDINGS:
        faults.append(
            f"quantisation.rounding is {quantisation.rounding!r}, not one of {', '.join(ROUNDINGS)}"
        )
    if quantisation.tokens < 0:
        faults.append(f"quantisation.tokens is {quantisation.tokens}")
    return faults


QUANTISATION_FIELDS: Final = {
    "rounding": Field(records.text),
    "block_size": Field(records.integer),
    "bits": Field(records.integer),
    "head_bits": Field(records.integer),
    "embedding_bits": Field(records.integer),
    "scaled_channels": Field(records.boolean, may_be_missing=True),
    "wide": Field(records.many(records.text, "strings"), may_be_missing=True),
    "text": Field(records.optional(records.text), may_be_missing=True),
    "tokens": Field(records.integer, may_be_missing=True),
}
