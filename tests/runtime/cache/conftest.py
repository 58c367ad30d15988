import os

import pytest

from echoatt_runtime.cache import HostMemory, KVCache


@pytest.fixture
def memory():
    """Memory of the device that the tests are run for; tests/cuda runs some of them for a GPU."""
    if os.environ.get("ECHOATT_TEST_DEVICE") == "cuda":
        from echoatt_runtime.executor.cuda_memory import CudaMemory

        return CudaMemory(0)
    return HostMemory(0)


@pytest.fixture
def make_cache(make_specification, memory):
    def make(slots, capacity, limit=600, **specification):
        caches = make_specification(**specification).caches
        return KVCache(caches, memory, slots, capacity, limit)

    return make
