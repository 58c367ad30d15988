"""What was published: a bundle's specification, its files, how it was verified.

The manifest is JSON in the ONNX model's `metadata_props` under `METADATA_KEY`, so a model file and
its weight file can be moved together and still be understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from echoatt_runtime.contract import records
from echoatt_runtime.contract.format_2 import upgrade
from echoatt_runtime.contract.names import METADATA_KEY
from echoatt_runtime.contract.records import Field
from echoatt_runtime.contract.specification import (
    SPECIFICATION_FIELDS,
    Specification,
    to_data,
)
from echoatt_runtime.errors import (
    DamagedBundleError,
    ForeignModelError,
    NewerFormatError,
    SpecificationError,
)

FORMAT_NUMBER: Final = 3
FORMAT: Final = f"echoatt-bundle/{FORMAT_NUMBER}"

# What this runtime knows how to do for a bundle. A bundle lists what it needs done; one that needs
# something else is refused by name.
CAPABILITIES: Final[Mapping[str, str]] = {
    "cache-list": "allocates the caches that the manifest lists, as they are laid out there",
    "chosen-tokens": "takes the tokens that a graph chooses on its device",
}
_ALWAYS_REQUIRED: Final = ("cache-list",)

_FORMAT_PATTERN: Final = re.compile(r"echoatt-bundle/(\d{1,9})")
_OLDEST_FORMAT: Final = 2

WEIGHTS: Final = "weights"
COMPANION: Final = "companion"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFile:
    """A file beside the model file.

    Attributes:
        name: Its bare name.
        role: `WEIGHTS`, or `COMPANION` for tokenizer, templates and configurations.
        bytes: Its exact size; None if that was not recorded, and then it may also be absent.
        sha256: Hash of its contents, 64 hexadecimal digits; None if that was not recorded.
        unknown: Fields that this version does not know, kept as they were read.
    """

    name: str
    role: str
    bytes: int | None
    sha256: str | None
    unknown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingCost:
    """How far a bundle with quantised weights is from the checkpoint's own; no judgement.

    Attributes:
        positions: Tokens of text that it was measured on.
        mean_kl: Mean Kullback-Leibler divergence of the next-token distributions, in nats.
        top1_agreement: Fraction of positions with the same most likely token.
        rms_error: Root mean square of the logits' differences, in units of their standard deviation
            over the vocabulary.
        unknown: Fields that this version does not know, kept as they were read.
    """

    positions: int
    mean_kl: float
    top1_agreement: float
    rms_error: float
    unknown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How a bundle was compared with the PyTorch model before it was published.

    Attributes:
        provider: ONNX Runtime execution provider that ran the bundle.
        passed: Whether every case stayed within the tolerance.
        method: What was compared with what, and what was allowed, in words; None if that was not
            recorded.
        tolerance: Absolute logit difference allowed where the largest was seen.
        max_abs_error: Largest absolute logit difference seen.
        cases: Number of cases compared.
        rounding_cost: What quantised weights cost; None for others, or if it was not recorded.
        unknown: Fields that this version does not know, kept as they were read.
    """

    provider: str
    passed: bool
    tolerance: float
    max_abs_error: float
    cases: int
    method: str | None = None
    rounding_cost: RoundingCost | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A published bundle's description of itself. An instance is consistent.

    Attributes:
        format: `FORMAT`.
        requires: What a runtime must know how to do, keys of `CAPABILITIES`.
        exporter_version: Version of EchoAtt that wrote the bundle.
        specification: What the graph computes.
        graph_sha256: Hash of the graph as it stands in the model file; None if not recorded.
        files: The files beside the model file, one of them `WEIGHTS`. Nothing else is used.
        verification: How it was verified; None if it was not.
        unknown: Fields that this version does not know, kept as they were read.

    Raises:
        DamagedBundleError: Fields contradict each other; the message lists every fault.
    """

    format: str = FORMAT
    requires: tuple[str, ...] = _ALWAYS_REQUIRED
    exporter_version: str
    specification: Specification
    graph_sha256: str | None = None
    files: tuple[BundleFile, ...]
    verification: Verification | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _raise_faults(_faults(self), "the manifest")

    @property
    def weights(self) -> BundleFile:
        """The external data file."""
        return next(file for file in self.files if file.role == WEIGHTS)

    @property
    def companions(self) -> tuple[BundleFile, ...]:
        """Tokenizer, templates and configurations."""
        return tuple(file for file in self.files if file.role == COMPANION)

    def to_json(self) -> str:
        """The manifest as one line of JSON; `from_json` gives an equal manifest back."""
        return json.dumps(to_data(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "the manifest") -> Manifest:
        """Read a manifest.

        Fields that this version does not know are kept, and fields that have a default may be
        missing: an addition which older runtimes can ignore needs no new format number. One that
        they cannot ignore is a capability that the bundle requires.

        Args:
            text: JSON as `to_json` writes it.
            where: What is being read, for messages.

        Raises:
            NewerFormatError: The format's number is larger than `FORMAT_NUMBER`, or the bundle
                requires what is not in `CAPABILITIES`.
            DamagedBundleError: Not JSON, or wrong fields; the message lists every fault.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedBundleError(f"{where} is not JSON ({error}); export it again") from error
        if not isinstance(data, dict):
            raise DamagedBundleError(f"{where} is not a JSON object; export it again")
        if _format_number(data.get("format"), where) < FORMAT_NUMBER:
            data = upgrade(data, FORMAT)
        _check_capabilities(data.get("requires"), where)
        try:
            values, faults = records.read_fields(data, _MANIFEST_FIELDS)
            _raise_faults(faults, where)
            return cls(**values)
        except SpecificationError as error:
            raise DamagedBundleError(f"{where} is damaged: {error}; export it again") from error

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


def required_by(specification: Specification) -> tuple[str, ...]:
    """What a runtime must know how to do for a bundle, keys of `CAPABILITIES`."""
    own = ("chosen-tokens",) if specification.choice_names else ()
    return (*_ALWAYS_REQUIRED, *own)


def _raise_faults(faults: list[str], where: str) -> None:
    if faults:
        raise DamagedBundleError(
            f"{where} is damaged: {records.join_faults(faults)}; export it again"
        )


def _faults(manifest: Manifest) -> list[str]:
    faults = []
    if manifest.format != FORMAT:
        faults.append(f"format is {manifest.format!r}, not {FORMAT!r}")
    names = [file.name.casefold() for file in manifest.files]
    if len(set(names)) < len(names):
        faults.append("a file is listed twice")
    weights = sum(file.role == WEIGHTS for file in manifest.files)
    if weights != 1:
        faults.append(f"{weights} files are the weights, expected one")
    for file in manifest.files:
        # A bare name keeps a crafted manifest from pointing outside the bundle's directory
        if file.name in ("", ".", "..") or re.search(r"[/\\\0:]", file.name):
            faults.append(f"{file.name!r} is not a bare file name")
        if file.role not in (WEIGHTS, COMPANION):
            faults.append(f"{file.name} has the role {file.role!r}")
        if file.bytes is not None and file.bytes < 0:
            faults.append(f"{file.name} has {file.bytes} bytes, which is negative")
        faults += _hash_faults(f"sha256 of {file.name}", file.sha256)
    return faults + _hash_faults("graph_sha256", manifest.graph_sha256)


def _hash_faults(name: str, value: str | None) -> list[str]:
    if value is None or re.fullmatch(r"[0-9a-f]{64}", value):
        return []
    return [f"{name} is not 64 hexadecimal digits"]


def _format_number(value: object, where: str) -> int:
    match = _FORMAT_PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise DamagedBundleError(f"{where} has format {value!r}, not {FORMAT!r}; export it again")
    number = int(match[1])
    if number > FORMAT_NUMBER:
        raise NewerFormatError(
            f"{where} has format {value!r} and this runtime reads up to {FORMAT!r}; "
            "it was made by a newer EchoAtt: install that, from its own directory"
        )
    if number < _OLDEST_FORMAT:
        raise DamagedBundleError(
            f"{where} has format {value!r} and this runtime reads {FORMAT!r} and back to number"
            f" {_OLDEST_FORMAT}; export it again"
        )
    return number


def _check_capabilities(requires: object, where: str) -> None:
    unknown = [
        name
        for name in (requires if isinstance(requires, list) else [])
        if isinstance(name, str) and name not in CAPABILITIES
    ]
    if unknown:
        raise NewerFormatError(
            f"{where} requires {', '.join(map(repr, unknown))}, which this runtime cannot do; "
            "install the EchoAtt that made it, from its own directory, or export the model again"
        )


def _read_specification(value: Any) -> Specification:
    try:
        return cast(Specification, records.record(Specification, SPECIFICATION_FIELDS)(value))
    except SpecificationError as error:
        raise records.WrongTypeError(f"consistent ({error})") from None


_FILE_FIELDS: Final = {
    "name": Field(records.text),
    "role": Field(records.text),
    "bytes": Field(records.optional(records.integer)),
    "sha256": Field(records.optional(records.text)),
}

_ROUNDING_COST_FIELDS: Final = {
    "positions": Field(records.integer),
    "mean_kl": Field(records.number),
    "top1_agreement": Field(records.number),
    "rms_error": Field(records.number),
}

_VERIFICATION_FIELDS: Final = {
    "provider": Field(records.text),
    "passed": Field(records.boolean),
    "tolerance": Field(records.number),
    "max_abs_error": Field(records.number),
    "cases": Field(records.integer),
    "method": Field(records.optional(records.text), may_be_missing=True),
    "rounding_cost": Field(
        records.optional(records.record(RoundingCost, _ROUNDING_COST_FIELDS)), may_be_missing=True
    ),
}

_MANIFEST_FIELDS: Final = {
    "format": Field(records.text),
    "requires": Field(records.many(records.text, "strings"), may_be_missing=True),
    "exporter_version": Field(records.text),
    "specification": Field(_read_specification),
    "graph_sha256": Field(records.optional(records.text), may_be_missing=True),
    "files": Field(records.many(records.record(BundleFile, _FILE_FIELDS), "files")),
    "verification": Field(
        records.optional(records.record(Verification, _VERIFICATION_FIELDS)), may_be_missing=True
    ),
}
