"""Memory that files are read into."""

import ctypes

import pytest

from tartapefs.base.buffers import aligned


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 100_001, 1 << 20])
def test_it_begins_at_a_cache_line(size: int) -> None:
    """And has as many bytes as asked for, all zero, to write to."""
    for _ in range(20):
        memory = aligned(size)
        assert memory == bytes(size)
        if size:
            assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 64 == 0
            memory[-1] = 1
