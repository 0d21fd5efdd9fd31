"""A cache of open descriptors, for large files that are read in parts.

Rule: bytes come from a file that `Source.open` opened below the root. After a read, every name on the file's path is
checked, from the root on: each must still lead to the same folder, the last one to the same file, and the file must be
as recorded. One thread at a time uses a descriptor. Any failure is a cache miss: the descriptor is closed, and the
normal path opens the file and decides.
"""

import os
from contextlib import suppress

from tartapefs.archive.member import Member
from tartapefs.source.drift import agrees
from tartapefs.source.folder import ResolvedPath, Source

LARGE = 1 << 20  # bytes: no reader reads so much in one request
_CAPACITY = 4  # the number of readers that a mount serves at once
_MAX_DEPTH = 3  # folders below the root; to check more takes as long as to open the file again


class DescriptorCache:
    """Open files of `source`, by the starts of their members. Usable from many threads."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[int, tuple[int, ResolvedPath]] = {}  # descriptors and their paths; each change is atomic

    def read(self, member: Member, part: memoryview, position: int, at_home: bool) -> bool:
        """Fills `part` from `position` of the member's body on; False if its file is not cached or not as recorded."""
        file = self._files.pop(member.start, None)
        if file is None:
            return False
        fd, resolved = file
        is_as_recorded = False
        try:
            if os.preadv(fd, (part,), position) == len(part):
                self._source.wait_for_holes(fd, resolved[-1][1])
                found = self._source.lstat_resolved(resolved)
                is_as_recorded = found is not None and agrees(member, found, at_home)
        except OSError:
            pass
        finally:
            if is_as_recorded and position + len(part) < member.size:  # the reader may go on
                self._keep(member.start, file)
            else:
                os.close(fd)
        return is_as_recorded

    def keep(self, member: Member, fd: int, found: os.stat_result) -> None:
        """Takes over the descriptor `fd` of the member's file, whose `fstat` is `found`: caches or closes it."""
        resolved: ResolvedPath = []
        path = member.path
        if path.count(b"/") <= _MAX_DEPTH:
            with suppress(OSError):
                resolved = self._source.resolve(path)
        if resolved and resolved[-1][1:] == (found.st_dev, found.st_ino):
            self._keep(member.start, (fd, resolved))
        else:
            os.close(fd)

    def _keep(self, start: int, file: tuple[int, ResolvedPath]) -> None:
        if self._files.setdefault(start, file) is not file:  # another thread has cached one
            os.close(file[0])
        elif len(self._files) > _CAPACITY:
            with suppress(StopIteration, RuntimeError, KeyError):  # other threads remove files, too
                os.close(self._files.pop(next(iter(self._files)))[0])

    def close(self) -> None:
        """Closes all descriptors but those in use, which the next call closes, or the end of this cache."""
        with suppress(KeyError):
            while True:
                os.close(self._files.popitem()[1][0])

    def __del__(self) -> None:
        self.close()
