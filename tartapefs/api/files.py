"""The files that an archive is shown as: itself, its parts, or its shards.

Rule: whatever is known of a file is computed from its number, so that 99,999 parts take the memory of one file; of a
shard it is kept where it starts. The whole archive is the only part of its size. The time of a file is that of the
generation that last changed a byte of it: the last one that begins before the file ends, since a generation takes the
place of the footer before.
"""

import os
from bisect import bisect_left
from collections.abc import Callable

from tartapefs.archive.layout import FOOTER, Extent
from tartapefs.base.naming import ARCHIVE_NAME, part_count, part_name, part_number, shard_name, shard_number
from tartapefs.index.recording import Recording
from tartapefs.index.shards import shard_starts

FIRST_INODE = 2  # FUSE's own root is 1


class Files:
    """The files, numbered from 0: the archive, or parts of `part_size` bytes, or shards of at most `shard_size`.

    Raises ValueError for a size that makes too many, and for two sizes; TapeFormatError if the index is damaged.

    name: of the archive.
    part_size, shard_size: as given.
    count: how many there are.
    is_split: whether they are parts or shards.
    """

    def __init__(
        self,
        tape: Recording,
        name: str = ARCHIVE_NAME,
        part_size: int | None = None,
        shard_size: int | None = None,
    ) -> None:
        if part_size is not None and shard_size is not None:
            raise ValueError("an archive is shown in parts or in shards")
        self.name = name
        self.part_size = part_size
        self.shard_size = shard_size
        self.is_split = part_size is not None or shard_size is not None
        self._total = tape.total_size
        self._name_of: Callable[[str, int], str] = part_name
        self._number_of: Callable[[str, str], int | None] = part_number
        self._shards = None if shard_size is None else shard_starts(tape, shard_size)
        if self._shards is None:
            self._size = tape.total_size if part_size is None else part_size
            self.count = part_count(self._total, self._size)
        else:
            self._name_of, self._number_of = shard_name, shard_number
            self.count = len(self._shards)
        self._begins = [generation.start for generation in tape.generations]
        self._recorded = [generation.recorded_ns for generation in tape.generations]

    def name_of(self, at: int) -> str:
        return self._name_of(self.name, at + 1) if self.is_split else self.name

    def find(self, name: bytes) -> int | None:
        """The number of the file of this name; None if there is none."""
        text = os.fsdecode(name)
        if not self.is_split:
            return 0 if text == self.name else None
        number = self._number_of(text, self.name)
        return number - 1 if number is not None and number <= self.count else None

    def extent(self, at: int) -> Extent:
        """What a file has of the archive. A shard has zeros where the archive goes on, the last one its footer."""
        if self._shards is None:
            return Extent(at * self._size, min((at + 1) * self._size, self._total))
        if at + 1 == self.count:
            return Extent(self._shards[at], self._total)
        return Extent(self._shards[at], self._shards[at + 1], FOOTER)

    def recorded_ns(self, at: int) -> int:
        """When the bytes of a file were last changed by a recording, in nanoseconds since 1970."""
        return self._recorded[bisect_left(self._begins, self.extent(at).stop) - 1]

    def inode(self, at: int) -> int:
        """The number by which a mount shows a file."""
        return FIRST_INODE + at
