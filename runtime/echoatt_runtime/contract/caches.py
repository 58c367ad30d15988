"""The cache layout as data: which caches a graph keeps, and how each lies in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from echoatt_runtime.contract.element_types import ELEMENT_TYPES, ElementType
from echoatt_runtime.contract.plan import SharingPlan

CacheKind = Literal["key", "value"]
CACHE_KINDS: Final = ("key", "value")

# The axes whose size is not the bundle's to say
BATCH: Final = "batch"
CAPACITY: Final = "capacity"

_Size = TypeVar("_Size", int, str, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """One cache of the graph.

    Attributes:
        name: `{layer}.{kind}`; input and output carry it behind `past_key_values.` and `present.`.
        kind: "key" or "value".
        layer: The layer that writes it.
        element_type: A key of `ELEMENT_TYPES`.
        axes: From the outermost: `BATCH` first, `CAPACITY` once, and the sizes of the others.
        scales: Name of the cache that holds this one's scales; None where elements need none.
        unknown: Fields that this version does not know, kept as they were read.
    """

    name: str
    kind: str
    layer: int
    element_type: str
    axes: tuple[str | int, ...]
    scales: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @property
    def past_name(self) -> str:
        """Name of the graph's input."""
        return f"past_key_values.{self.name}"

    @property
    def present_name(self) -> str:
        """Name of the graph's output, the updated cache."""
        return f"present.{self.name}"

    @property
    def elements(self) -> ElementType:
        """The element type itself."""
        return ELEMENT_TYPES[self.element_type]

    @property
    def capacity_axis(self) -> int:
        """The axis along which tokens lie."""
        return self.axes.index(CAPACITY)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes."""
        size = self.elements.bytes
        for axis in self.axes:
            size *= axis if isinstance(axis, int) else 1
        return size

    def shape(self, batch: _Size, capacity: _Size) -> tuple[int | _Size, ...]:
        """The dimensions, with what stands for batch and capacity put in."""
        sizes = {BATCH: batch, CAPACITY: capacity}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)


def lay_out_caches(
    plan: SharingPlan,
    kv_heads: Sequence[int],
    head_dims: Sequence[int],
    element_type: str,
    device: str = "cpu",
) -> tuple[CacheSpec, ...]:
    """The caches of a decoder, in the graph's order: by layer a source's keys, then the values.

    Keys lie [batch, heads, capacity, head size]. Values for a CPU lie [batch, heads, head size,
    capacity]: a token's context is then a product in which the cache is the left operand, which a
    CPU multiplies without copying it. For CUDA they lie as keys do, which its fused kernels ask
    for, and a new token's are one run of memory.

    Args:
        plan: Followers have no keys.
        kv_heads: Key/value heads of each layer.
        head_dims: Size of a head in each layer.
        element_type: Of every cache.
        device: What the graph is lowered for.
    """
    caches = []
    for layer, (heads, size) in enumerate(zip(kv_heads, head_dims, strict=True)):
        axes: dict[CacheKind, tuple[str | int, ...]] = {}
        if not plan.is_follower(layer):
            axes["key"] = (BATCH, heads, CAPACITY, size)
        is_turned = device == "cpu"
        axes["value"] = (BATCH, heads, *((size, CAPACITY) if is_turned else (CAPACITY, size)))
        caches += [
            CacheSpec(
                name=f"{layer}.{kind}",
                kind=kind,
                layer=layer,
                element_type=element_type,
                axes=of_kind,
            )
            for kind, of_kind in axes.items()
        ]
    return tuple(caches)


def cache_faults(caches: Sequence[CacheSpec], plan: SharingPlan) -> list[str]:
    """Everything that is wrong with a cache layout, each fault a phrase."""
    counts = Counter(cache.name for cache in caches)
    faults = [f"cache {name} is there twice" for name, count in counts.items() if count > 1]
    kinds: dict[int, list[str]] = {}
    for cache in caches:
        faults += [f"cache {cache.name} {fault}" for fault in _faults(cache, counts, plan)]
        kinds.setdefault(cache.layer, []).append(cache.kind)
    for layer in range(plan.num_layers):
        wanted = ["value"] if plan.is_follower(layer) else ["key", "value"]
        found = sorted(kinds.get(layer, ()))
        if found != wanted:
            faults.append(
                f"layer {layer} has the caches {', '.join(found) or 'none'}, expected"
                f" {' and '.join(wanted)}"
            )
    return faults


def _faults(cache: CacheSpec, names: Container[str], plan: SharingPlan) -> list[str]:
    faults = []
    if cache.kind not in CACHE_KINDS:
        faults.append(f"is of kind {cache.kind!r}, not one of {', '.join(CACHE_KINDS)}")
    if not 0 <= cache.layer < plan.num_layers:
        faults.append(f"is of layer {cache.layer}, which does not exist")
    if cache.name != f"{cache.layer}.{cache.kind}":
        faults.append(f"is not called {cache.layer}.{cache.kind}")
    if cache.element_type not in ELEMENT_TYPES:
        faults.append(
            f"has elements of type {cache.element_type!r}, not one of {', '.join(ELEMENT_TYPES)}"
        )
    fixed = [axis for axis in cache.axes if axis not in (BATCH, CAPACITY)]
    if (
        cache.axes[:1] != (BATCH,)
        or cache.axes.count(BATCH) > 1
        or cache.axes.count(CAPACITY) != 1
        or not all(isinstance(axis, int) and 1 <= axis < 2**31 for axis in fixed)
    ):
        faults.append(
            f"has the axes {list(cache.axes)}; expected {BATCH} first, {CAPACITY} once, and sizes"
        )
    if cache.scales is not None and cache.scales not in names:
        faults.append(f"has its scales in {cache.scales}, which does not exist")
    return faults
