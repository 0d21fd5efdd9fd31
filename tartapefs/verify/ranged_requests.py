"""Which ranges of a copy are read for some members, and a copy that is a local file.

Rule: of a member its header and its body are read, not the padding. Neighbours share a request, also across a gap that
costs less than another request; a request has at most `LONGEST` bytes, so a large body takes several. Memory: that for
each thread.
"""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member
from tartapefs.base.buffers import read_all

LONGEST = 8 << 20  # bytes


class CopyReader(Protocol):
    """A copy of an archive, or a part of one. Usable from many threads.

    size: in bytes.
    gap: how many bytes are sooner read for nothing than left out by another request.
    """

    size: int
    gap: int

    def readinto(self, view: memoryview, position: int) -> None:
        """Fills `view` from `position` of the copy on, in bytes. Raises CopyError, and OSError."""
        ...

    def cost(self) -> str:
        """What reading took, as text for people; empty if that costs nothing."""
        ...

    def close(self) -> None: ...


class LocalCopy:
    """A file, or a device."""

    gap = BLOCK  # the padding between neighbours

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise

    def readinto(self, view: memoryview, position: int) -> None:
        read_all(self._fd, view, position)

    def cost(self) -> str:
        return ""

    def close(self) -> None:
        os.close(self._fd)


class Slice(NamedTuple):
    """The bytes `[start, stop)` of the archive, of one member: from its header on, or whole blocks of its body."""

    member: Member
    start: int
    stop: int


def slices(member: Member, block_size: int) -> Iterator[Slice]:
    """A member in slices of at most `LONGEST` bytes, which end at the ends of blocks of its body."""
    start, body, end = member.start, member.body, member.body + member.size
    while True:
        blocks = (LONGEST - max(body - start, 0)) // block_size
        stop = min(max(start, body) + blocks * block_size, end)
        yield Slice(member, start, stop)
        if stop == end:
            return
        start = stop


def requests(members: Iterable[Member], gap: int, block_size: int) -> Iterator[list[Slice]]:
    """The slices of the members, in the order of their starts; those that share a request together."""
    request: list[Slice] = []
    for member in sorted(members):
        for each in slices(member, block_size):
            if request and (each.start - request[-1].stop > gap or each.stop - request[0].start > LONGEST):
                yield request
                request = []
            request.append(each)
    if request:
        yield request
