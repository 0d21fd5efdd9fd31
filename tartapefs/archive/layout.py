"""Computes where every byte of an archive lies. Pure arithmetic, no I/O.

Rule: the archive is a sequence of members and a footer, without gaps. A member is its header, its body, and padding to
the next block; directories and links have no body. A header has one block; if the name or the target of a link does
not fit into it, more blocks before that one belong to it. All ranges are half-open, `[start, stop)`, in bytes from the
start of the archive, and a segment is never empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tartapefs.archive.names import LONGEST_TARGET, LONGEST_UNSPLIT, split_name

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


class Extent(NamedTuple):
    """What a file that is shown of the archive has: the range `[start, stop)` of it, then `zeros` bytes of NUL.

    start, stop: bytes, from the start of the archive.
    zeros: the bytes of a footer that the archive does not have there.
    size: of the file, in bytes.
    """

    start: int
    stop: int
    zeros: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start + self.zeros

    def locate(self, position: int, size: int) -> tuple[int, int, int]:
        """What a read of `size` bytes at `position` of the file gets: an offset in the archive, how many bytes from
        there, and how many zeros after them. All of them together are fewer than `size` only at the file's end.

        >>> shard = Extent(2048, 4096, 1024)
        >>> shard.locate(0, 512), shard.locate(1536, 1024), shard.locate(2560, 9999), shard.locate(9999, 1)
        ((2048, 512, 0), (3584, 512, 512), (4096, 0, 512), (4096, 0, 0))
        """
        offset = min(self.start + position, self.stop)
        count = min(size, self.stop - offset)
        return offset, count, max(0, min(size - count, self.size - position - count))


def head_size(name: bytes, target: bytes) -> int:
    """The bytes of the header of a member with this whole name and, of a link, this target: its body begins there.

    >>> head_size(b"a" * 100, b""), head_size(b"a" * 101, b""), head_size(b"a", b"t" * 512)
    (512, 1536, 2048)
    """
    if len(name) <= LONGEST_UNSPLIT and len(target) <= LONGEST_TARGET:
        return BLOCK
    size = BLOCK
    if len(target) > LONGEST_TARGET:
        size += span(len(target) + 1)  # it ends with a NUL
    if split_name(name) is None:
        size += span(len(name) + 1)
    return size


def span(size: int, head: int = BLOCK) -> int:
    """The bytes that a member with a header of `head` bytes and a body of `size` takes: header, body, padding.

    >>> span(0), span(1), span(512), span(513)
    (512, 1024, 1024, 1536)
    """
    return head + (size + BLOCK - 1) // BLOCK * BLOCK


def block_count(size: int) -> int:
    """The number of 512-byte blocks that hold `size` bytes, as `st_blocks` counts them."""
    return (size + BLOCK - 1) // BLOCK


def segments(start: int, size: int, head: int = BLOCK) -> Iterator[Segment]:
    """The segments of the member that starts at `start`, with `head` bytes of header and `size` of body, in order."""
    body = start + head
    yield Segment(Kind.HEADER, start, body)
    padding, stop = body + size, start + span(size, head)
    if size:
        yield Segment(Kind.BODY, body, padding)
    if padding < stop:
        yield Segment(Kind.PADDING, padding, stop)


def footer(total_size: int) -> Segment:
    """The footer of an archive of `total_size` bytes."""
    return Segment(Kind.FOOTER, total_size - FOOTER, total_size)
