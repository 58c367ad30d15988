"""The most probable tokens of each row, apart from the others."""

import numpy as np
import pytest

from echoatt_runtime.cache import HostMemory
from echoatt_runtime.executor.top_rows import MOST_TOP, TopRows


def put(logits):
    memory = HostMemory(logits.nbytes)
    memory.write(0, logits.reshape(-1).view(np.uint8))
    return memory


@pytest.mark.parametrize("vocabulary", [5, 64, 65, 300])
def test_tokens_come_with_their_logits_the_most_probable_first(vocabulary):
    logits = np.random.default_rng(0).permutation(3 * vocabulary).astype(np.float32)
    logits = logits.reshape(3, vocabulary)
    memory, number = put(logits), min(MOST_TOP, vocabulary)
    found = TopRows("cpu", HostMemory(0), vocabulary).find(memory.address, 3, number)
    expected = np.argsort(-logits, axis=1)[:, : MOST_TOP + 1]
    np.testing.assert_array_equal(found.token_ids, expected)
    np.testing.assert_array_equal(found.logits, np.take_along_axis(logits, expected, 1))


def test_tokens_that_are_as_probable_as_the_last_may_be_left_out():
    logits = np.arange(200, dtype=np.float32)[None].repeat(2, 0)
    # In one row the 5th to the 70th are equal
    logits[1, 130:196] = 130
    memory, top = put(logits), TopRows("cpu", HostMemory(0), 200)
    assert top.find(memory.address, 2, 4) is not None
    assert top.find(memory.address, 2, 5) is None
    assert top.find(memory.address, 1, MOST_TOP) is not None
