"""What a bundle says of itself: the schema, its JSON, and the graph contract's names.

The manifest is JSON in the ONNX model's `metadata_props` under `METADATA_KEY`, so a model file and
its weight file can be moved together and still be understood. The order of inputs and outputs
that `input_names` and `output_names` give is part of the contract between exporter and runtime.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from echoatt_runtime.contract.manifest_rules import (
    DEVICES,
    DTYPES,
    FORMAT,
    FORMAT_NUMBER,
    LAYER_KINDS,
    consistency_faults,
)
from echoatt_runtime.errors import DamagedBundleError, ForeignModelError, NewerFormatError

__all__ = [
    "DEVICES",
    "DTYPES",
    "FORMAT",
    "FORMAT_NUMBER",
    "INPUT_IDS",
    "LAYER_KINDS",
    "LOGITS",
    "LOGITS_INDICES",
    "METADATA_KEY",
    "PAST_LENGTHS",
    "Manifest",
    "SourceCheckpoint",
    "Verification",
    "capacity_axis",
]

METADATA_KEY: Final = "echoatt.manifest"

INPUT_IDS: Final = "input_ids"
PAST_LENGTHS: Final = "past_lengths"
LOGITS_INDICES: Final = "logits_indices"
LOGITS: Final = "logits"

_FORMAT_PATTERN: Final = re.compile(r"echoatt-bundle/(\d{1,9})")
_CACHE_ELEMENT_TYPES: Final = {"fp16": "float16", "bf16": "bfloat16"}
_ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


_Capacity = TypeVar("_Capacity", int, str, None)


def capacity_axis(cache_name: str) -> int:
    """The axis of a cache along which tokens lie, 2 for keys and 3 for values.

    Args:
        cache_name: Any name of it, such as "present.0.value".
    """
    return 3 if cache_name.endswith(".value") else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """The checkpoint that a bundle was made from.

    Attributes:
        name: Directory or hub name, for people to read.
        sha256: Hash of its weights, 64 hexadecimal digits.
    """

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How a bundle was compared with the PyTorch model before it was published.

    Attributes:
        provider: ONNX Runtime execution provider that ran the bundle.
        passed: Whether every case stayed within the tolerance.
        tolerance: Largest absolute logit difference allowed.
        max_abs_error: Largest absolute logit difference seen.
        cases: Number of cases compared.
    """

    provider: str
    passed: bool
    tolerance: float
    max_abs_error: float
    cases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A bundle's description of itself. An instance is consistent, or it does not exist.

    Attributes:
        format: `FORMAT`.
        exporter_version: Version of EchoAtt that wrote the bundle.
        family: Model family of the checkpoint, such as "llama".
        sources: The sharing plan: for each layer the layer whose probabilities it uses.
        head_orders: How the exporter moved the followers' heads when it applied the plan to
            `source_checkpoint`: empty, or for each layer the head put at each position, empty where
            none moved. The weights have it folded in; nothing is left to do at run time.
        layer_kinds: "full" or "sliding" for each layer.
        sliding_window: Window of the sliding layers in tokens; None without such layers.
        num_query_heads: Query heads of every layer.
        num_kv_heads: Key/value heads of every layer.
        head_dim: Size of a head.
        vocab_size: Width of the logits.
        context_length: Most tokens that a row may hold, prompt and new ones together.
        dtype: "fp32", "fp16", "bf16", "int8" or "int4".
        device: What the bundle was exported for, "cpu" or "cuda".
        bos_token_id: Token that begins a text, if the model has one.
        eos_token_ids: Tokens that end generation.
        pad_token_id: Token for padding, if the model has one.
        weights_file: Name of the external data file beside the model.
        weights_bytes: Exact size of that file.
        source_checkpoint: What the bundle was made from.
        verification: How it was verified; None if it was not.

    Raises:
        DamagedBundleError: Fields contradict each other; the message lists every fault.
    """

    format: str = FORMAT
    exporter_version: str
    family: str
    sources: tuple[int, ...]
    head_orders: tuple[tuple[int, ...], ...]
    layer_kinds: tuple[str, ...]
    sliding_window: int | None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    weights_file: str
    weights_bytes: int
    source_checkpoint: SourceCheckpoint
    verification: Verification | None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        _raise_faults(consistency_faults(values), "the manifest")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.sources)

    def is_follower(self, layer: int) -> bool:
        """Whether `layer` uses another layer's probabilities, and so has no key cache."""
        return self.sources[layer] != layer

    @property
    def cache_names(self) -> tuple[str, ...]:
        """`{layer}.key` and `{layer}.value` of every cache, in graph order."""
        names = []
        for layer in range(self.num_layers):
            if not self.is_follower(layer):
                names.append(f"{layer}.key")
            names.append(f"{layer}.value")
        return tuple(names)

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs, in graph order."""
        return tuple(f"past_key_values.{name}" for name in self.cache_names)

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in graph order; each belongs to the same place's input."""
        return tuple(f"present.{name}" for name in self.cache_names)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of all graph inputs, in order."""
        return (INPUT_IDS, PAST_LENGTHS, LOGITS_INDICES, *self.past_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of all graph outputs, in order."""
        return (LOGITS, *self.present_names)

    def cache_dims(self, cache_name: str, capacity: _Capacity) -> tuple[int | _Capacity, ...]:
        """Dimensions of a cache behind the batch: keys [N, T, D], values [N, D, T].

        Values lie transposed because a token's context is then a product in which the cache is the
        left operand, which a CPU multiplies without copying it.

        Args:
            cache_name: Any name of it, such as "present.0.value".
            capacity: T, or what stands for it.
        """
        if capacity_axis(cache_name) == 3:
            return (self.num_kv_heads, self.head_dim, capacity)
        return (self.num_kv_heads, capacity, self.head_dim)

    @property
    def cache_element_type(self) -> str:
        """Element type of every cache: "float32", "float16" or "bfloat16"."""
        return _CACHE_ELEMENT_TYPES.get(self.dtype, "float32")

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in all the caches together."""
        element_bytes = _ELEMENT_BYTES[self.cache_element_type]
        return len(self.cache_names) * self.num_kv_heads * self.head_dim * element_bytes

    def to_json(self) -> str:
        """The manifest as one line of JSON; `from_json` gives an equal manifest back."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "the manifest") -> Manifest:
        """Read a manifest.

        Fields that this version does not know are left alone, so that an addition which older
        runtimes can ignore needs no new format number.

        Args:
            text: JSON as `to_json` writes it.
            where: What is being read, for messages.

        Raises:
            NewerFormatError: The format's number is larger than `FORMAT_NUMBER`.
            DamagedBundleError: Not JSON, or wrong fields; the message lists every fault.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise DamagedBundleError(f"{where} is not JSON ({error}); export it again") from error
        if not isinstance(data, dict):
            raise DamagedBundleError(f"{where} is not a JSON object; export it again")
        _check_format(data.get("format"), where)
        values, faults = _read_fields(data, _MANIFEST_READERS)
        faults += consistency_faults(values)
        _raise_faults(faults, where)
        return cls(**values)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> Manifest:
        """Read the manifest from an ONNX model's metadata.

        Args:
            metadata: The model's `metadata_props` as a mapping.
            where: The model's path, for messages.

        Raises:
            ForeignModelError: There is no manifest.
            NewerFormatError: As in `from_json`.
            DamagedBundleError: As in `from_json`.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise ForeignModelError(
                f"{where} is an ONNX file without an EchoAtt manifest; "
                "make a bundle from its checkpoint with echoatt-export"
            )
        return cls.from_json(text, f"the manifest of {where}")


def _raise_faults(faults: list[str], where: str) -> None:
    if faults:
        raise DamagedBundleError(f"{where} is damaged: {'; '.join(faults)}; export it again")


def _check_format(value: object, where: str) -> None:
    match = _FORMAT_PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise DamagedBundleError(f"{where} has format {value!r}, not {FORMAT!r}; export it again")
    if int(match[1]) > FORMAT_NUMBER:
        raise NewerFormatError(
            f"{where} has format {value!r} and this runtime reads up to {FORMAT!r}; "
            "it was made by a newer EchoAtt: upgrade with pip install -U echoatt"
        )
    if int(match[1]) < FORMAT_NUMBER:
        raise DamagedBundleError(
            f"{where} has format {value!r} and this runtime reads {FORMAT!r} only; export it again"
        )


# A reader turns a JSON value into a field's value, or raises _WrongTypeError with what is expected.
class _WrongTypeError(Exception):
    pass


_Reader = Callable[[object], Any]


def _read_str(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongTypeError("a string")
    return value


def _read_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongTypeError("true or false")
    return value


def _read_int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _WrongTypeError("an integer")
    return value


def _read_float(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _WrongTypeError("a finite number")
    return float(value)


def _read_int_or_null(value: object) -> int | None:
    if value is None:
        return None
    try:
        return _read_int(value)
    except _WrongTypeError:
        raise _WrongTypeError("an integer or null") from None


def _read_ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise _WrongTypeError("a list of integers")
    return tuple(value)


def _read_orders(value: object) -> tuple[tuple[int, ...], ...]:
    try:
        if isinstance(value, list):
            return tuple(map(_read_ints, value))
    except _WrongTypeError:
        pass
    raise _WrongTypeError("a list of lists of integers")


def _read_strs(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or any(type(item) is not str for item in value):
        raise _WrongTypeError("a list of strings")
    return tuple(value)


def _read_record(record: type, readers: Mapping[str, _Reader], value: object) -> Any:
    if not isinstance(value, dict):
        raise _WrongTypeError("an object")
    values, faults = _read_fields(value, readers)
    if faults:
        raise _WrongTypeError(f"right inside ({', '.join(faults)})")
    return record(**values)


def _read_checkpoint(value: object) -> SourceCheckpoint:
    readers: dict[str, _Reader] = {"name": _read_str, "sha256": _read_str}
    return cast(SourceCheckpoint, _read_record(SourceCheckpoint, readers, value))


def _read_verification(value: object) -> Verification | None:
    readers: dict[str, _Reader] = {
        "provider": _read_str,
        "passed": _read_bool,
        "tolerance": _read_float,
        "max_abs_error": _read_float,
        "cases": _read_int,
    }
    if value is None:
        return None
    return cast(Verification, _read_record(Verification, readers, value))


_MANIFEST_READERS: Final[dict[str, _Reader]] = {
    "format": _read_str,
    "exporter_version": _read_str,
    "family": _read_str,
    "sources": _read_ints,
    "head_orders": _read_orders,
    "layer_kinds": _read_strs,
    "sliding_window": _read_int_or_null,
    "num_query_heads": _read_int,
    "num_kv_heads": _read_int,
    "head_dim": _read_int,
    "vocab_size": _read_int,
    "context_length": _read_int,
    "dtype": _read_str,
    "device": _read_str,
    "bos_token_id": _read_int_or_null,
    "eos_token_ids": _read_ints,
    "pad_token_id": _read_int_or_null,
    "weights_file": _read_str,
    "weights_bytes": _read_int,
    "source_checkpoint": _read_checkpoint,
    "verification": _read_verification,
}


def _read_fields(
    data: Mapping[str, object], readers: Mapping[str, _Reader]
) -> tuple[dict[str, Any], list[str]]:
    values, faults = {}, []
    for name, read in readers.items():
        if name not in data:
            faults.append(f"{name} is missing")
            continue
        try:
            values[name] = read(data[name])
        except _WrongTypeError as error:
            faults.append(f"{name} is not {error}")
    return values, faults
