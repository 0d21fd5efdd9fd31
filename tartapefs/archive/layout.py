"""Computes where every byte of an archive lies. Pure arithmetic, no I/O.

Rule: the archive is a sequence of members and a footer, without gaps. A member is a header of one block, its body, and
padding to the next block; directories and links have no body. All ranges are half-open, `[start, stop)`, in bytes from
the start of the archive, and a segment is never empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

BLOCK = 512  # bytes
FOOTER = 2 * BLOCK
MAX_OFFSET = 2**63 - 1  # the largest off_t, and the largest integer SQLite stores


class Kind(StrEnum):
    """The kinds of segments.

    HEADER, BODY, PADDING: of a member.
    FOOTER: the zeros at the end of the archive.
    """

    HEADER = "header"
    BODY = "body"
    PADDING = "padding"
    FOOTER = "footer"


@dataclass(frozen=True, slots=True)
class Segment:
    """A non-empty range of bytes of the archive.

    kind: of all its bytes.
    start, stop: the range `[start, stop)`, in bytes from the start of the archive.
    """

    kind: Kind
    start: int
    stop: int


def span(size: int) -> int:
    """The bytes that a member with a body of `size` bytes takes: header, body, padding.

    >>> span(0), span(1), span(512), span(513)
    (512, 1024, 1024, 1536)
    """
    return BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK


def block_count(size: int) -> int:
    """The number of 512-byte blocks that hold `size` bytes, as `st_blocks` counts them."""
    return (size + BLOCK - 1) // BLOCK


def segments(start: int, size: int) -> Iterator[Segment]:
    """The segments of the member that starts at `start` and has a body of `size` bytes, in order."""
    body = start + BLOCK
    yield Segment(Kind.HEADER, start, body)
    padding, stop = body + size, start + span(size)
    if size:
        yield Segment(Kind.BODY, body, padding)
    if padding < stop:
        yield Segment(Kind.PADDING, padding, stop)


def footer(total_size: int) -> Segment:
    """The footer of an archive of `total_size` bytes."""
    return Segment(Kind.FOOTER, total_size - FOOTER, total_size)
