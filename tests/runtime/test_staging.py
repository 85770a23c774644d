"""Copies into and out of staging memory, of any size and layout."""

from __future__ import annotations

import numpy as np
import pytest

from pollard.runtime.staging import PageableStaging, lay, taken

SMALL, LARGE = 40, 300_000
"""Elements that are copied with the GIL held, and too many for that."""


@pytest.mark.parametrize("count", [1, SMALL, LARGE])
@pytest.mark.parametrize("kind", ["uint8", "float16", "float32", "int64", "bool"])
def test_arrays_come_out_as_they_were_laid_one_after_the_other(count: int, kind: str) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 2, (rows, count)).astype(kind) for rows in (1, 3)]
    memory = PageableStaging().allocate(sum(array.nbytes for array in arrays) + 8)
    end = 0
    for array in arrays:
        end = lay(memory.data, end, array)
    assert end == memory.nbytes - 8
    assert not memory[end:].any()
    found = taken(memory.data, np.dtype(kind), (4, count))
    np.testing.assert_array_equal(found, np.concatenate(arrays))
    # What comes next is written to the same place.
    assert not np.shares_memory(found, memory)


@pytest.mark.parametrize("count", [SMALL, LARGE])
def test_arrays_that_do_not_lie_in_one_piece_are_laid_by_their_elements(count: int) -> None:
    array = np.arange(2 * count, dtype=np.float32).reshape(2, count)[:, ::2]
    memory = PageableStaging().allocate(array.nbytes)
    assert lay(memory.data, 0, array) == array.nbytes
    np.testing.assert_array_equal(taken(memory.data, array.dtype, array.shape), array)


@pytest.mark.parametrize("count", [SMALL, LARGE])
@pytest.mark.parametrize("skipped", range(1, 4))
def test_elements_are_laid_from_wherever_they_lie(count: int, skipped: int) -> None:
    values = np.arange(count, dtype=np.float32)
    message = bytes(skipped) + values.tobytes()
    array = np.ndarray(values.shape, np.float32, memoryview(message)[skipped:])
    memory = PageableStaging().allocate(array.nbytes)
    lay(memory.data, 0, array)
    np.testing.assert_array_equal(taken(memory.data, values.dtype, values.shape), values)


def test_what_is_read_only_can_be_laid_and_what_comes_out_can_be_written() -> None:
    array = np.frombuffer(b"abc", np.uint8)
    memory = PageableStaging().allocate(3)
    lay(memory.data, 0, array)
    found = taken(memory.data, array.dtype, (3,))
    found[0] = 0
    assert bytes(memory) == b"abc"
