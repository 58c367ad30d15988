import numpy as np
import pytest

from echoatt_runtime import ContextOverflowError, OutOfMemoryError
from echoatt_runtime.cache import HostMemory, KVCache, bucket_capacity


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
    """Every cache with axes [T, B, N, D], as the order of keys and values tells."""
    return [
        cache.array(index).transpose((3, 0, 1, 2) if name.endswith("value") else (2, 0, 1, 3))
        for index, name in enumerate(CACHES)
    ]


def fill(cache):
    generator = np.random.default_rng(0)
    for index in range(len(CACHES)):
        cache.fill(index, generator.normal(size=cache.array(index).shape))
    return [array.copy() for array in tokens_first(cache)]


@pytest.fixture
def make_cache(make_specification):
    def make(slots, capacity, limit=600, **specification):
        caches = make_specification(**specification).caches
        return KVCache(caches, HostMemory(0), slots, capacity, limit)

    return make


def test_caches_start_with_zeros_as_they_are_laid_out(make_cache):
    cache = make_cache(3, 10)
    arrays = [cache.array(index) for index in range(len(CACHES))]
    key, value = (3, 2, 10, 4), (3, 2, 4, 10)
    assert [array.shape for array in arrays] == [key, value, key, value, value]
    assert not any(array.any() for array in arrays)
    assert cache.nbytes == sum(array.nbytes for array in arrays)
    assert all(cache.address(index, 0) % 64 == 0 for index in range(len(CACHES)))


@pytest.mark.parametrize(("dtype", "element"), [("fp16", np.float16), ("bf16", np.uint16)])
def test_element_types_of_caches(make_cache, dtype, element):
    cache = make_cache(1, 16, dtype=dtype)
    assert {cache.array(index).dtype for index in range(5)} == {np.dtype(element)}
    cache.fill(1, np.arange(128).reshape(1, 2, 4, 16))
    cache.reserve(20, [16])
    np.testing.assert_array_equal(
        cache.array(1)[..., :16], np.arange(128).reshape(1, 2, 4, 16).astype(element)
    )


def test_reserve_keeps_what_is_valid_and_clears_the_rest(make_cache):
    cache = make_cache(3, 10)
    before, layout = fill(cache), cache.layout
    cache.reserve(300, [7, 2])
    assert cache.capacity == 528
    assert cache.layout != layout
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:7, 0], old[:7, 0])
        np.testing.assert_array_equal(new[:2, 1], old[:2, 1])
        assert not new[7:, 0].any()
        assert not new[2:, 1].any()
        assert not new[:, 2].any()


def test_reserve_does_nothing_where_there_is_room(make_cache):
    cache = make_cache(1, 256)
    before, places = cache.layout, [cache.address(index, 0) for index in range(5)]
    cache.reserve(256, [100])
    assert (cache.layout, [cache.address(index, 0) for index in range(5)]) == (before, places)


def test_shrinking_gives_room_back_where_that_is_worth_the_copy(make_cache):
    cache = make_cache(2, 2000, limit=4000)
    before = fill(cache)
    cache.shrink(1500, [1400, 3])  # to 1,552: less than a quarter is gained
    assert cache.capacity == 2000
    cache.shrink(1200, [1190, 3])
    assert cache.capacity == 1296
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:1190, 0], old[:1190, 0])
        np.testing.assert_array_equal(new[:3, 1], old[:3, 1])


def test_a_moved_row_leaves_the_others_where_they_are(make_cache):
    cache = make_cache(4, 10)
    before, layout = fill(cache), cache.layout
    cache.move(3, 1, 9)
    assert cache.layout == layout
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:9, 1], old[:9, 3])
        np.testing.assert_array_equal(new[:, [0, 2, 3]], old[:, [0, 2, 3]])


def test_a_slot_takes_no_memory_before_it_is_used(make_cache):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = make_cache(1000, 100_016, limit=200_000)
    cache.reserve(150_000, [10])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert cache.nbytes > 10 << 30
    assert grown < 200 << 10  # kilobytes


def test_memory_that_is_not_there_is_an_error(make_cache):
    with pytest.raises(OutOfMemoryError, match="run fewer prompts at once"):
        make_cache(10**9, 600)


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
    live = tokens_first(cache)
    executor.run(cache, np.array([[5]]), np.array([2]), np.zeros((1, 1), np.int64))
    for array in live:
        written = np.flatnonzero(np.abs(array).sum(axis=(1, 2, 3)))
        assert written.tolist() == [2]
