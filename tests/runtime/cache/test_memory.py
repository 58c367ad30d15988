import numpy as np

BYTES = np.random.default_rng(0).integers(1, 256, 100, np.uint8)


def filled(memory):
    new = memory.new(BYTES.size)
    new.write(0, BYTES)
    return new


def test_memory_starts_with_zeros(memory):
    for nbytes in (0, 1, 1000):
        # What is given back is often given out again
        memory.new(nbytes).write(0, np.ones(nbytes, np.uint8))
        new = memory.new(nbytes)
        assert new.nbytes == nbytes
        assert not nbytes or new.address % 64 == 0
        np.testing.assert_array_equal(new.read(), np.zeros(nbytes, np.uint8))


def test_bytes_are_written_and_cleared(memory):
    new = filled(memory)
    np.testing.assert_array_equal(new.read(), BYTES)
    new.write(10, BYTES[:7])
    new.clear(50, 20)
    expected = BYTES.copy()
    expected[10:17] = BYTES[:7]
    expected[50:70] = 0
    np.testing.assert_array_equal(new.read(), expected)


def test_runs_of_bytes_are_copied(memory):
    source, target = filled(memory), memory.new(200)
    source.copy_rows(4, 30, 9, target, 11, 50, 3)
    expected = np.zeros(200, np.uint8)
    for row in range(3):
        expected[11 + 50 * row :][:9] = BYTES[4 + 30 * row :][:9]
    np.testing.assert_array_equal(target.read(), expected)
    source.copy_rows(0, 10, 10, target, 0, 10, 0)
    source.copy_rows(0, 10, 0, target, 0, 10, 3)
    np.testing.assert_array_equal(target.read(), expected)
    np.testing.assert_array_equal(source.read(), BYTES)


def test_runs_of_bytes_are_copied_within(memory):
    new = filled(memory)
    new.copy_rows(0, 20, 5, new, 60, 20, 2)
    expected = BYTES.copy()
    expected[60:65], expected[80:85] = BYTES[:5], BYTES[20:25]
    np.testing.assert_array_equal(new.read(), expected)
