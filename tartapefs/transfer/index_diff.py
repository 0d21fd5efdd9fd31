"""Compares two recordings: what was added, removed, changed and moved, and which prefix both archives share.

Rule: headers are compared byte by byte, built from both indexes. Bodies are not read: one counts as equal only if its
recorded size and modification time (in nanoseconds) agree and, if both recordings are of the same folder, inode and
change time too. So the prefix is exact to the byte inside a header, ends at the first byte of a body that may differ,
and is never too long unless a file changed in a way that no `stat` shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tartapefs.api.tape import Tape
from tartapefs.archive.member import Member
from tartapefs.base.errors import TapeFormatError

ChangeKind = Literal["added", "removed", "changed", "moved"]
Progress = Callable[[int, int], None]  # (members so far, offset of the last of them in the new archive)
_PROGRESS_EVERY = 1024  # members


@contextmanager
def naming_another() -> Iterator[None]:
    """Of an index in this block that cannot be used no folder is known: another one is all that helps."""
    try:
        yield
    except TapeFormatError as error:
        error.remedy = "name another index"
        raise


def _nothing(members: int, position: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Change:
    """A member that differs, or lies at another offset.

    Attributes: `kind`; `old` and `new`, the member in each recording, or None.
    """

    kind: ChangeKind
    old: Member | None
    new: Member | None

    @property
    def member(self) -> Member:
        return self.new or self.old  # type: ignore[return-value]  # at least one is a member


def first_difference(one: bytes, other: bytes) -> int:
    """The first index at which they differ; the length of the shorter one if the other begins with it.

    >>> first_difference(b"abcd", b"abxd"), first_difference(b"ab", b"abc"), first_difference(b"", b"")
    (2, 2, 0)
    """
    low, high = 0, min(len(one), len(other))  # equal below `low`; by halves, since comparing bytes is memcmp
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Comparison:
    """Compares the archive of `old` with that of `new`. `check`: "mtime" never compares inode and change time."""

    def __init__(self, old: Tape, new: Tape, check: Literal["full", "mtime"] = "full") -> None:
        self.old, self.new = old, new
        self._same_folder = check == "full" and old.root_ino == new.root_ino

    def _same_content(self, one: Member, other: Member) -> bool:
        """Whether two members with the same header count as equal."""
        return not one.size or (
            one.mtime_ns == other.mtime_ns
            and (not self._same_folder or (one.ino == other.ino and one.ctime_ns == other.ctime_ns))
        )

    def prefix(self, on_progress: Progress = _nothing) -> int:
        """The length of the longest common prefix of both archives, in bytes."""
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
                    return one.body
            stop = one.stop
            if count % _PROGRESS_EVERY == 0:
                on_progress(count, other.start)
        # If only one archive ends here, they differ: a footer is NUL bytes, and a header begins with a name.
        return stop if self.old.total_size != self.new.total_size else self.old.total_size

    def extension(self, prefix: int) -> tuple[int, int] | None:
        """The members and the bytes by which `new` extends `old`; None if it is no extension. `prefix`: of both."""
        added = [generation for generation in self.new.generations if generation.start >= self.old.facts.end]
        if prefix != self.old.facts.end or not added or added[0].start != prefix:
            return None
        return sum(generation.members for generation in added), added[-1].stop - prefix

    def changes(self, on_progress: Progress = _nothing) -> Iterator[Change]:
        """Yields all members that differ, in the order of their paths. Memory does not grow with their number.

        "moved" is the same header and content at another offset.
        """
        ours, theirs = self.old.latest_members(), self.new.latest_members()
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
