"""From a student in float32 to one on levels of few bits, and how that was done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from echoatt_exporter.errors import ExportError
from echoatt_exporter.quantise.block_quantizer import BLOCK_SIZE
from echoatt_exporter.quantise.choose_widths import choose_widths
from echoatt_exporter.quantise.draw_windows import draw_windows
from echoatt_exporter.quantise.round_weights import (
    has_shared_table,
    round_calibrated,
    round_to_nearest,
)
from echoatt_exporter.quantise.scale_channels import scale_channels
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.texts import Text, load_tokenizer, read_texts, sample_windows, texts_digest
from echoatt_runtime.contract import DTYPES, ROUNDINGS, Bits, Quantisation, Specification

# A table that is looked up costs no time, and next to nothing of the model, at 8 bits
_TABLE_BITS: Final = 8
# What a graph takes in its file, somewhat more than was seen: the layers of SmolLM2 11,500 each
_GRAPH_BYTES: Final = 65_536
_LAYER_BYTES: Final = 14_000
# Windows of text and their tokens. A large model takes longer for each, and writes many short ones
# faster than few long ones.
_WINDOWS: Final = (24, 256)
_WINDOWS_OF_LARGE: Final = (16, 128)
_LARGE: Final = 300_000_000

# Told (what is being done, done, total)
_OnPart = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingChoice:
    """How weights shall be rounded to few bits.

    Attributes:
        rounding: "calibrated", by what it does on text, or "nearest".
        texts: Files of calibration text; without any, the model writes it.
        max_megabytes: Most that the bundle's files may take together: as many weights as there is
            room for get 8 bits instead of 4, those first whose rounding costs most. None leaves
            all at 4.

    Raises:
        ExportError: No such rounding, or text for one that reads none.
    """

    rounding: str = "calibrated"
    texts: Sequence[str | Path] = ()
    max_megabytes: float | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ExportError(
                f"unknown rounding {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}"
            )
        if self.max_megabytes is not None and not 0 < self.max_megabytes < math.inf:
            raise ExportError(
                f"a bundle of {self.max_megabytes} MB cannot be; give a positive size"
            )
        if self.texts and self.rounding != "calibrated":
            raise ExportError(
                f"rounding {self.rounding!r} reads no calibration text; leave the text out, or"
                " choose calibrated"
            )
        if self.max_megabytes is not None and self.rounding != "calibrated":
            raise ExportError(
                f"rounding {self.rounding!r} does not know which weights to widen; leave the size"
                " out, or choose calibrated"
            )

    def read(self, dtype: str) -> list[Text]:
        """The calibration text, where this choice is one for a dtype.

        Raises:
            ExportError: The dtype has nothing to choose.
            TextError: The text cannot be read.
        """
        bits = DTYPES[dtype].bits
        if bits is None:
            raise ExportError(f"{dtype} rounds no weights to few bits; leave the rounding out")
        if bits == 8 and self.max_megabytes is not None:
            raise ExportError(f"{dtype} has 8 bits everywhere; leave the size out, or choose int4")
        return read_texts(self.texts) if self.texts else []


def quantise_student(
    student: EchoAttForCausalLM,
    specification: Specification,
    choice: RoundingChoice,
    texts: Sequence[Text],
    *,
    model_dir: Path,
    other_bytes: int,
    trust_remote_code: bool = False,
    on_part: _OnPart = lambda _name, _done, _total: None,
) -> Specification:
    """Round a student's weights in place; give its specification with how that was done.

    Args:
        student: On the CPU, in float32 and in evaluation mode.
        specification: Of the bundle; its dtype says to how many bits.
        choice: How.
        texts: What its files hold.
        model_dir: Where the tokenizer for calibration text lies.
        other_bytes: What the bundle's files take besides weights and graph.
        trust_remote_code: Run code that the checkpoint brings.
        on_part: Told what goes on.

    Raises:
        EchoAttError: The calibration text is too little, the bundle too small, or the model
            computes no numbers.
    """
    bits = specification.weight_dtype.bits
    assert bits is not None  # noqa: S101 - only quantised dtypes come here
    table_bits: Bits = bits if has_shared_table(student) else _TABLE_BITS
    quantisation = Quantisation(
        rounding=choice.rounding,
        block_size=BLOCK_SIZE,
        bits=bits,
        head_bits=bits,
        embedding_bits=table_bits,
    )

    def on_weight(done: int, total: int) -> None:
        on_part("round", done, total)

    if choice.rounding == "nearest":
        round_to_nearest(student, quantisation, on_weight)
    else:
        parameters = sum(parameter.numel() for parameter in student.parameters())
        count, length = _WINDOWS if parameters < _LARGE else _WINDOWS_OF_LARGE
        length = min(length, specification.context_length)
        if texts:
            tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
            windows = sample_windows(texts, tokenizer, length=length, count=count)
            origin = f"given, SHA-256 {texts_digest(texts)}"
        else:
            on_part("calibration text", 0, 1)
            windows = draw_windows(
                student, count=count, length=length, begin=specification.bos_token_id
            )
            origin = "written by the model"
        if choice.max_megabytes is not None:
            on_part("widths", 0, 1)
            rest = other_bytes + _GRAPH_BYTES + _LAYER_BYTES * specification.num_layers
            most = int(choice.max_megabytes * 1e6) - rest
            quantisation = choose_widths(student, quantisation, windows, most)
        if bits == 8:
            on_part("scale channels", 0, 1)
            scaled = scale_channels(student, windows)
            quantisation = dataclasses.replace(quantisation, scaled_channels=scaled)
        round_calibrated(student, quantisation, windows, on_weight)
        quantisation = dataclasses.replace(quantisation, text=origin, tokens=windows.numel())
    return dataclasses.replace(specification, quantisation=quantisation)
