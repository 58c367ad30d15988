"""What a CPU alone can show: pages that are not there yet, and numbers."""

import numpy as np
import pytest

from echoatt_runtime.cache import HostMemory, KVCache


def test_a_slot_takes_no_memory_before_it_is_used(make_cache):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = make_cache(1000, 100_016, limit=200_000)
    cache.reserve(150_000, [10])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert cache.nbytes > 10 << 30
    assert grown < 200 << 10  # kilobytes


def test_runs_of_bytes_outside_memory_are_refused():
    memory = HostMemory(100)
    with pytest.raises(IndexError, match="not inside 100"):
        memory.copy_rows(0, 50, 51, HostMemory(200), 0, 60, 2)
    with pytest.raises(ValueError, match="broadcast"):
        memory.write(90, np.zeros(20, np.uint8))


def test_a_grown_cache_goes_on_where_it_was(executor, decoder):
    tokens = np.random.default_rng(2).integers(0, 256, 30)
    cache = KVCache(executor.specification.caches, HostMemory(0), 1, 8, 600)
    for at, token in enumerate(tokens):
        cache.reserve(at + 1, [at])
        logits = executor.run(
            cache, np.array([[token]]), np.array([at]), np.zeros((1, 1), np.int64)
        )
        np.testing.assert_allclose(logits[0, 0], decoder.logits(tokens)[at], atol=1e-4)
    assert cache.capacity == 272


def test_a_step_writes_in_place(executor):
    cache = executor.new_cache(1, 8)
    live = [
        cache.array(index).transpose((3, 0, 1, 2) if spec.kind == "value" else (2, 0, 1, 3))
        for index, spec in enumerate(cache.specs)
    ]
    executor.run(cache, np.array([[5]]), np.array([2]), np.zeros((1, 1), np.int64))
    for array in live:
        written = np.flatnonzero(np.abs(array).sum(axis=(1, 2, 3)))
        assert written.tolist() == [2]
