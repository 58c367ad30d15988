import pytest

from echoatt_runtime import ContextOverflowError
from echoatt_runtime.cache import bucket_capacity


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
