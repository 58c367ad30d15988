"""What is to be built: a decoder's shape, its sharing plan, and how its graph keeps caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from echoatt_runtime.contract import records
from echoatt_runtime.contract.caches import CacheSpec, cache_faults
from echoatt_runtime.contract.element_types import DTYPES, Dtype, ElementType
from echoatt_runtime.contract.names import (
    CHOICES,
    INPUT_IDS,
    LOGIT_SUMS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
)
from echoatt_runtime.contract.plan import SharingPlan
from echoatt_runtime.contract.quantisation import (
    QUANTISATION_FIELDS,
    Quantisation,
    quantisation_faults,
)
from echoatt_runtime.contract.records import Field
from echoatt_runtime.errors import SpecificationError

LayerKind = Literal["full", "sliding"]
LAYER_KINDS: Final = ("full", "sliding")
DEVICES: Final = ("cpu", "cuda")

# No size of a decoder comes near it, and sums of such sizes still fit 64 bits
_LARGEST: Final = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """The checkpoint that a bundle is made from.

    Attributes:
        name: Directory or hub name, for people to read.
        sha256: Hash of its weights, 64 hexadecimal digits.
        unknown: Fields that this version does not know, kept as they were read.
    """

    name: str
    sha256: str
    unknown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Specification:
    """What a bundle's graph computes and for which device. An instance is consistent.

    Attributes:
        family: Model family of the checkpoint, such as "llama".
        plan: The sharing plan. Where it orders heads, the weights have the order folded in: nothing
            is left to do at run time.
        layer_kinds: "full" or "sliding" for each layer.
        sliding_window: Window of the sliding layers in tokens; None without such layers.
        query_heads: Query heads of each layer.
        kv_heads: Key/value heads of each layer.
        head_dims: Size of a head in each layer.
        vocab_size: Width of the logits.
        context_length: Most tokens that a row may hold, prompt and new ones together.
        dtype: A key of `DTYPES`.
        device: What the graph is lowered for, one of `DEVICES`.
        caches: The caches, in the graph's order.
        bos_token_id: Token that begins a text, if the model has one.
        eos_token_ids: Tokens that end generation.
        pad_token_id: Token for padding, if the model has one.
        source_checkpoint: What it is made from.
        quantisation: How the weights were rounded, where the dtype is quantised; None also in
            bundles of versions that did not say.
        unknown: Fields that this version does not know, kept as they were read.

    Raises:
        SpecificationError: Fields contradict each other; the message lists every fault.
    """

    family: str
    plan: SharingPlan
    layer_kinds: tuple[str, ...]
    sliding_window: int | None
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    caches: tuple[CacheSpec, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    source_checkpoint: SourceCheckpoint
    quantisation: Quantisation | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if faults := _faults(self):
            raise SpecificationError(records.join_faults(faults))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.plan.num_layers

    @property
    def weight_dtype(self) -> Dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    @property
    def compute(self) -> ElementType:
        """Element type of what the graph computes."""
        return self.weight_dtype.compute_on(self.device)

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs, in graph order."""
        return tuple(cache.past_name for cache in self.caches)

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in graph order; each belongs to the same place's input."""
        return tuple(cache.present_name for cache in self.caches)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of all graph inputs, in order."""
        return (INPUT_IDS, PAST_LENGTHS, LOGITS_INDICES, *self.past_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs that every lowering has, in order."""
        return (LOGITS, *self.present_names)

    @property
    def choice_names(self) -> tuple[str, ...]:
        """Names of the outputs behind them by which a graph chooses tokens on its device.

        They are the most probable token at each wanted position, int64 [batch, n], and the sum of
        its logits, float32 [batch, n], which is finite where all of them are.
        """
        return (CHOICES, LOGIT_SUMS) if self.device == "cuda" else ()

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in all the caches together."""
        return sum(cache.bytes_per_token for cache in self.caches)


def _faults(spec: Specification) -> list[str]:
    faults = _number_faults(spec)
    for name, value, allowed in (
        ("dtype", spec.dtype, tuple(DTYPES)),
        ("device", spec.device, DEVICES),
        *((f"layer_kinds[{i}]", kind, LAYER_KINDS) for i, kind in enumerate(spec.layer_kinds)),
    ):
        if value not in allowed:
            faults.append(f"{name} is {value!r}, not one of {', '.join(allowed)}")
    if "sliding" in spec.layer_kinds and spec.sliding_window is None:
        faults.append("sliding_window is null although layers are sliding")
    lengths = {
        name: len(getattr(spec, name))
        for name in ("layer_kinds", "query_heads", "kv_heads", "head_dims")
    }
    count = spec.plan.num_layers
    wrong = [f"{name} has {n} layers" for name, n in lengths.items() if n != count]
    if count == 0 or wrong:
        return [*faults, *wrong, f"the plan has {count} layers"]
    for layer, (heads, kv_heads) in enumerate(zip(spec.query_heads, spec.kv_heads, strict=True)):
        if kv_heads >= 1 and heads % kv_heads:
            faults.append(
                f"the {heads} query heads of layer {layer} do not divide into {kv_heads}"
                " key/value heads"
            )
    faults += spec.plan.faults(spec.layer_kinds, spec.query_heads, spec.kv_heads)
    faults += cache_faults(spec.caches, spec.plan)
    if spec.dtype in DTYPES:
        faults += quantisation_faults(spec.quantisation, spec.weight_dtype.bits)
    return faults + _token_faults(spec)


def _number_faults(spec: Specification) -> list[str]:
    numbers: list[tuple[str, int]] = [
        ("vocab_size", spec.vocab_size),
        ("context_length", spec.context_length),
    ]
    if spec.sliding_window is not None:
        numbers.append(("sliding_window", spec.sliding_window))
    for name in ("query_heads", "kv_heads", "head_dims"):
        numbers += [(f"{name}[{i}]", value) for i, value in enumerate(getattr(spec, name))]
    return [
        f"{name} is {value}, which is not positive" if value < 1 else f"{name} is {value}"
        for name, value in numbers
        if not 1 <= value < _LARGEST
    ]


def _token_faults(spec: Specification) -> list[str]:
    tokens = [("bos_token_id", spec.bos_token_id), ("pad_token_id", spec.pad_token_id)]
    tokens += [("eos_token_ids", token) for token in spec.eos_token_ids]
    faults = [
        f"{name} has {token}, outside the vocabulary of {spec.vocab_size}"
        for name, token in tokens
        if token is not None and not 0 <= token < spec.vocab_size
    ]
    digest = spec.source_checkpoint.sha256
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        faults.append("source_checkpoint.sha256 is not 64 hexadecimal digits")
    return faults


_INTEGERS = records.many(records.integer, "integers")

_PLAN_FIELDS: Final = {
    "sources": Field(_INTEGERS),
    "head_orders": Field(records.many(_INTEGERS, "lists of integers"), may_be_missing=True),
}


def _read_plan(sources: Sequence[int], head_orders: Any = (), **_: Any) -> SharingPlan:
    return SharingPlan(tuple(sources), tuple(head_orders))


_CACHE_FIELDS: Final = {
    "name": Field(records.text),
    "kind": Field(records.text),
    "layer": Field(records.integer),
    "element_type": Field(records.text),
    "axes": Field(
        records.many(
            records.any_of(records.text, records.integer, "a name or a size"), "names and sizes"
        )
    ),
    "scales": Field(records.optional(records.text), may_be_missing=True),
}

_CHECKPOINT_FIELDS: Final = {"name": Field(records.text), "sha256": Field(records.text)}

SPECIFICATION_FIELDS: Final = {
    "family": Field(records.text),
    "plan": Field(records.record(_read_plan, _PLAN_FIELDS)),
    "layer_kinds": Field(records.many(records.text, "strings")),
    "sliding_window": Field(records.optional(records.integer)),
    "query_heads": Field(_INTEGERS),
    "kv_heads": Field(_INTEGERS),
    "head_dims": Field(_INTEGERS),
    "vocab_size": Field(records.integer),
    "context_length": Field(records.integer),
    "dtype": Field(records.text),
    "device": Field(records.text),
    "caches": Field(records.many(records.record(CacheSpec, _CACHE_FIELDS), "caches")),
    "bos_token_id": Field(records.optional(records.integer)),
    "eos_token_ids": Field(_INTEGERS),
    "pad_token_id": Field(records.optional(records.integer)),
    "source_checkpoint": Field(records.record(SourceCheckpoint, _CHECKPOINT_FIELDS)),
    "quantisation": Field(
        records.optional(records.record(Quantisation, QUANTISATION_FIELDS)), may_be_missing=True
    ),
}


def to_data(value: Any) -> Any:
    """A record as JSON's types, with the fields that were not known when it was read."""
    if isinstance(value, SharingPlan):
        orders = {"head_orders": value.head_orders} if value.head_orders else {}
        return {"sources": value.sources} | orders
    if hasattr(value, "__dataclass_fields__"):
        known = {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
        return {**known.pop("unknown", {}), **known}
    if isinstance(value, tuple):
        return [to_data(item) for item in value]
    return value
