"""The files of a mounted folder: the archive, or its parts.

Rule: whatever is known of a file is computed from its number, so that 99,999 parts take the memory of one file. The
whole archive is the only part of its size. A part's time is that of the generation that last changed a byte of it: the
last one that begins before the part ends, since a generation takes the place of the footer before.
"""

import os
from bisect import bisect_left

from tartapefs.base.naming import part_count, part_name, part_number
from tartapefs.index.recording import Recording

FIRST_INODE = 2  # FUSE's own root is 1


class Files:
    """The files, numbered from 0. Raises ValueError for a `part_size` that makes too many; None is for one file.

    name: of the archive.
    size: bytes of each file but the last, which may be shorter.
    count: how many there are.
    is_split: whether they are parts.
    """

    def __init__(self, tape: Recording, name: str, part_size: int | None) -> None:
        self.name = name
        self.is_split = part_size is not None
        self.size = tape.total_size if part_size is None else part_size
        self.count = part_count(tape.total_size, self.size)
        self._total = tape.total_size
        self._begins = [generation.start for generation in tape.generations]
        self._recorded = [generation.recorded_ns for generation in tape.generations]

    def name_of(self, at: int) -> str:
        return part_name(self.name, at + 1) if self.is_split else self.name

    def find(self, name: bytes) -> int | None:
        """The number of the file of this name; None if there is none."""
        text = os.fsdecode(name)
        if not self.is_split:
            return 0 if text == self.name else None
        number = part_number(text, self.name)
        return number - 1 if number is not None and number <= self.count else None

    def bounds(self, at: int) -> tuple[int, int]:
        """The range of the archive that a file has."""
        return at * self.size, min((at + 1) * self.size, self._total)

    def recorded_ns(self, at: int) -> int:
        """When the bytes of a file were last changed by a recording, in nanoseconds since 1970."""
        return self._recorded[bisect_left(self._begins, self.bounds(at)[1]) - 1]

    def inode(self, at: int) -> int:
        return FIRST_INODE + at
