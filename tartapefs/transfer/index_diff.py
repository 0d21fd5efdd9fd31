"""Two recordings of one archive: what was added, removed, changed and moved, and how much of the old bytes is the new.

Rule: headers are compared byte by byte, made anew from both indexes. A body is believed equal only if size and
modification time (in nanoseconds) agree as recorded, and, where both recordings are of the same folder, inode and
change time too; it is not read. So the prefix that is told is exact to the byte inside a header, and never too long
unless a file changed in a way that no `stat` shows; within a body that may differ, it ends at the body's first byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tartapefs.api.tape import Tape
from tartapefs.archive.layout import BLOCK
from tartapefs.archive.member import Member

Kind = Literal["added", "removed", "changed", "moved"]
Progress = Callable[[int, int], None]  # (members so far, where the last of them lies in the new archive)
_PROGRESS_EVERY = 1024  # members


def _nothing(members: int, position: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Change:
    """One member that is not where or what it was: `old` and `new` are its records, None where there is none."""

    kind: Kind
    old: Member | None
    new: Member | None

    @property
    def member(self) -> Member:
        return self.new or self.old  # type: ignore[return-value]  # one of them there is


def first_difference(one: bytes, other: bytes) -> int:
    """The first place where they differ: the length of the shorter one if it begins the other.

    >>> first_difference(b"abcd", b"abxd"), first_difference(b"ab", b"abc"), first_difference(b"", b"")
    (2, 2, 0)
    """
    low, high = 0, min(len(one), len(other))  # equal below `low`; by halves, since a comparison of bytes is memcmp
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Comparison:
    """The archive of `old` against that of `new`. `check`: "mtime" never compares inode and change time."""

    def __init__(self, old: Tape, new: Tape, check: Literal["full", "mtime"] = "full") -> None:
        self.old, self.new = old, new
        self._same_folder = check == "full" and old.root_ino == new.root_ino

    def _same_content(self, one: Member, other: Member) -> bool:
        """For two members with the same header."""
        return not one.size or (
            one.mtime_ns == other.mtime_ns
            and (not self._same_folder or (one.ino == other.ino and one.ctime_ns == other.ctime_ns))
        )

    def prefix(self, on_progress: Progress = _nothing) -> int:
        """The length of the longest prefix of the old archive that the new one has too, in bytes."""
        if self.old.rows_digest == self.new.rows_digest:
            return self.old.total_size
        stop = 0
        pairs = zip(self.old.members(), self.new.members(), strict=False)
        for count, (one, other) in enumerate(pairs, 1):
            if one != other:
                mine, its = one.header(), other.header()
                if mine != its:
                    return one.start + first_difference(mine, its)
                if not self._same_content(one, other):
                    return one.start + BLOCK
            stop = one.stop
            if count % _PROGRESS_EVERY == 0:
                on_progress(count, other.start)
        # A footer is NUL bytes, and a header begins with a name: where one ends and the other goes on, they differ.
        return stop if self.old.total_size != self.new.total_size else self.old.total_size

    def changes(self, on_progress: Progress = _nothing) -> Iterator[Change]:
        """All members that differ, in the archive's order; nothing of what is the same in the same place.

        "moved": the same header and content at another offset. Memory does not grow with their number.
        """
        ours, theirs = self.old.members(), self.new.members()
        one, other, count = next(ours, None), next(theirs, None), 0
        while one is not None or other is not None:
            count += 1
            if count % _PROGRESS_EVERY == 0:
                on_progress(count, other.start if other is not None else self.new.total_size)
            if other is None or (one is not None and one.sort_key < other.sort_key):
                yield Change("removed", one, None)
                one = next(ours, None)
                continue
            if one is None or other.sort_key < one.sort_key:
                yield Change("added", None, other)
                other = next(theirs, None)
                continue
            if one.header() != other.header() or not self._same_content(one, other):
                yield Change("changed", one, other)
            elif one.start != other.start:
                yield Change("moved", one, other)
            one, other = next(ours, None), next(theirs, None)
