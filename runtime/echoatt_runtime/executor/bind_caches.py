"""Binds slots of a cache to a graph, which updates them in place."""

from __future__ import annotations

from echoatt_runtime.cache import KVCache
from echoatt_runtime.ort import Binding


def bind_caches(binding: Binding, device: str, cache: KVCache, first_slot: int, count: int) -> None:
    """Bind `count` slots of every cache from `first_slot` on, each as input and as output.

    Args:
        binding: Of the session.
        device: Where the graph runs.
        cache: The caches.
        first_slot: The slot of the first row.
        count: Number of rows.
    """
    for index, spec in enumerate(cache.specs):
        place = (
            device,
            spec.elements,
            spec.shape(count, cache.capacity),
            cache.address(index, first_slot),
        )
        # One buffer for both, which the graph updates in place
        binding.bind_input(spec.past_name, *place)
        binding.bind_output(spec.present_name, *place)
