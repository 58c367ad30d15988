import itertools

import numpy as np
import pytest

from echoatt_runtime import OutOfMemoryError
from echoatt_runtime.cache import KVCache

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


def test_memory_that_is_not_there_is_an_error(make_cache):
    with pytest.raises(OutOfMemoryError, match="run fewer prompts at once"):
        make_cache(10**9, 600)


@pytest.fixture
def scarce_memory(memory):
    """`scarce_memory(number)`: memory of which the allocation with that number fails."""

    def scarce(fails_at):
        numbers = itertools.count()

        class Scarce(type(memory)):
            def new(self, nbytes):
                if next(numbers) == fails_at:
                    raise OutOfMemoryError("there is no memory left")
                return Scarce(nbytes)

        return Scarce(0)

    return scarce


@pytest.mark.parametrize("moved", [0, 3])
def test_a_cache_that_cannot_move_is_as_it_was(scarce_memory, make_specification, moved):
    memory = scarce_memory(len(CACHES) + moved)
    cache = KVCache(make_specification().caches, memory, 2, 528, 600)
    before = fill(cache)
    with pytest.raises(OutOfMemoryError):
        cache.reserve(600, [528, 3])
    assert cache.capacity == 528
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:, 0], old[:, 0])
        np.testing.assert_array_equal(new[:3, 1], old[:3, 1])


def test_a_cache_without_room_to_shrink_stays(scarce_memory, make_specification):
    cache = KVCache(make_specification().caches, scarce_memory(len(CACHES) + 2), 2, 528, 600)
    before = fill(cache)
    cache.shrink(10, [9, 3])
    assert cache.capacity == 528
    for old, new in zip(before, tokens_first(cache), strict=True):
        np.testing.assert_array_equal(new[:9, 0], old[:9, 0])
        np.testing.assert_array_equal(new[:3, 1], old[:3, 1])
