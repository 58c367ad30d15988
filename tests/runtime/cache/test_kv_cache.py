import numpy as np
import onnxruntime
import pytest

from echoatt_runtime import ContextOverflowError
from echoatt_runtime.cache.kv_cache import DeviceBuffer, HostBuffer, bucket_capacity


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [
        (1, 272),
        (272, 272),
        (273, 528),
        (4096, 4112),
        (4112, 4112),
        (4113, 4368),
        (9000, 9232),
        (40_000, 40_976),
    ],
)
def test_buckets_grow_in_steps_and_then_in_proportion(tokens, capacity):
    assert bucket_capacity(tokens, 131_072) == capacity


def test_growth_is_amortised():
    copied, capacity = 0, 272
    while capacity < 131_072:
        copied += capacity
        capacity = bucket_capacity(capacity + 1, 131_072)
    # Growing token by token would copy 65,536 times the final length.
    assert copied < 40 * 131_072


def test_the_last_bucket_ends_at_the_limit():
    assert bucket_capacity(1, 100) == 112
    assert bucket_capacity(500, 600) == 528
    assert bucket_capacity(529, 600) == 608
    assert bucket_capacity(600, 600) == 608
    assert bucket_capacity(1, 256) == 272  # never a multiple of 256
    with pytest.raises(ContextOverflowError, match="609 tokens does not fit the limit of 600"):
        bucket_capacity(609, 600)


CACHES = ("0.key", "0.value", "1.key", "1.value", "2.value")


def tokens_first(cache):
    """The buffers with axes [T, B, N, D], as the manifest's order of keys and values tells."""
    return [
        array.transpose((3, 0, 1, 2) if name.endswith("value") else (2, 0, 1, 3))
        for name, array in zip(CACHES, cache.to_host(), strict=True)
    ]


def fill(cache):
    generator = np.random.default_rng(0)
    for array in cache.to_host():
        array[...] = generator.normal(size=array.shape)
    return [array.copy() for array in tokens_first(cache)]


def test_caches_start_with_zeros_in_the_manifests_shape(session):
    cache = session.new_cache(3, 10)
    key, value = (3, 2, 10, 4), (3, 2, 4, 10)
    assert [array.shape for array in cache.to_host()] == [key, value, key, value, value]
    assert not any(array.any() for array in cache.to_host())
    assert cache.nbytes == sum(array.nbytes for array in cache.to_host())


def test_reserve_keeps_what_is_valid_and_clears_the_rest(session):
    cache = session.new_cache(2, 10)
    before = fill(cache)
    cache.reserve(300, valid=7)
    assert cache.capacity == 528
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:7], old[:7])
        assert not new[7:].any()


def test_reserve_does_nothing_where_there_is_room(session):
    cache = session.new_cache(1, 256)
    before = cache.to_host()
    cache.reserve(256, valid=100)
    assert all(old is new for old, new in zip(before, cache.to_host(), strict=True))


def test_select_keeps_rows_in_order(session):
    cache = session.new_cache(4, 10)
    before = fill(cache)
    cache.select([3, 1], valid=9)
    assert (cache.batch, cache.capacity) == (2, 10)
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:9], old[:9, [3, 1]])


def test_a_grown_cache_goes_on_where_it_was(session, decoder):
    tokens = np.random.default_rng(2).integers(0, 256, 30)
    cache = session.new_cache(1, 8)
    for at, token in enumerate(tokens):
        cache.reserve(at + 1, valid=at)
        logits = session.run(cache, np.array([[token]]), np.array([at]), np.zeros((1, 1), np.int64))
        np.testing.assert_allclose(logits[0, 0], decoder.logits(tokens)[at], atol=1e-4)
    assert cache.capacity == 272


def test_a_step_writes_in_place(session):
    cache = session.new_cache(1, 8)
    live = tokens_first(cache)
    session.run(cache, np.array([[5]]), np.array([2]), np.zeros((1, 1), np.int64))
    for array in live:
        written = np.flatnonzero(np.abs(array).sum(axis=(1, 2, 3)))
        assert written.tolist() == [2]


@pytest.mark.parametrize(
    ("host_type", "onnx_type"), [(np.float32, 1), (np.float16, 10), (np.uint16, 16)]
)
def test_device_buffers_copy_both_ways(host_type, onnx_type):
    # The CPU serves as the device: the calls are those that any device takes.
    host = np.arange(24).astype(host_type).reshape(1, 2, 3, 4)
    buffer = DeviceBuffer(onnxruntime, host, onnx_type, "cpu")
    assert buffer.value.element_type() == onnx_type
    kept = host.copy()
    host[...] = 0
    back = buffer.to_host()
    assert back.dtype == host_type
    np.testing.assert_array_equal(back, kept)


def test_host_buffers_are_the_arrays_own_memory():
    host = np.zeros((1, 2, 3, 4), np.float32)
    buffer = HostBuffer(onnxruntime, host, 1)
    assert buffer.value.data_ptr() == host.ctypes.data
    assert buffer.to_host() is host
