"""The arithmetic of an archive: half-open ranges that join, none of them empty."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartapefs.archive import layout
from tartapefs.archive.layout import Extent, Kind, Segment

SIZES = [0, 1, 511, 512, 513, 1023, 1024, 1025, (8 << 30) - 1, 8 << 30, (1 << 40) + 1]


def blocks(size: int) -> int:
    """How many blocks of 512 bytes hold `size` bytes, by division with the rest looked at."""
    whole, rest = divmod(size, 512)
    return whole + (rest > 0)


@pytest.mark.parametrize("size", SIZES)
def test_span_and_blocks(size: int) -> None:
    """A member takes a block for its header and whole blocks for its body."""
    assert layout.block_count(size) == blocks(size)
    assert layout.span(size) == 512 + 512 * blocks(size)


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (0, [Kind.HEADER]),
        (1, [Kind.HEADER, Kind.BODY, Kind.PADDING]),
        (511, [Kind.HEADER, Kind.BODY, Kind.PADDING]),
        (512, [Kind.HEADER, Kind.BODY]),
        (513, [Kind.HEADER, Kind.BODY, Kind.PADDING]),
        (1024, [Kind.HEADER, Kind.BODY]),
    ],
)
def test_kinds_of_segments(size: int, kinds: list[Kind]) -> None:
    """What is empty is no segment: no body of an empty file, no padding of a whole block."""
    assert [segment.kind for segment in layout.segments(0, size)] == kinds


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(0, 2**50).map(lambda block: block * 512), st.integers(0, 2**62) | st.integers(0, 5000))
def test_segments_join(start: int, size: int) -> None:
    """From the member's start to its end, each segment starts where the one before it stops, and holds something."""
    segments = list(layout.segments(start, size))
    position = start
    for segment in segments:
        assert segment.start == position < segment.stop
        position = segment.stop
    assert position == start + layout.span(size)
    assert sum(s.stop - s.start for s in segments if s.kind == Kind.BODY) == size
    assert sum(s.stop - s.start for s in segments if s.kind == Kind.PADDING) == -size % 512


def test_footer() -> None:
    """Two blocks, and nothing after them."""
    assert layout.footer(10_240) == Segment(Kind.FOOTER, 10_240 - 1024, 10_240)


def test_segments_are_values() -> None:
    segment = Segment(Kind.HEADER, 0, 512)
    assert segment == Segment(Kind("header"), 0, 512)
    with pytest.raises(dataclasses.FrozenInstanceError):
        segment.start = 1


@pytest.mark.parametrize("extent", [Extent(3, 9), Extent(3, 9, 4), Extent(0, 5, 1), Extent(2, 2, 3), Extent(0, 20)])
def test_a_read_of_an_extent_is_one_of_a_file_with_these_bytes(extent: Extent) -> None:
    archive = bytes(range(1, 21))
    file = archive[extent.start : extent.stop] + bytes(extent.zeros)
    assert extent.size == len(file)
    for position in range(len(file) + 3):
        for size in range(len(file) + 3):
            offset, count, zeros = extent.locate(position, size)
            assert archive[offset : offset + count] + bytes(zeros) == file[position : position + size]
            assert count >= 0 and zeros >= 0
