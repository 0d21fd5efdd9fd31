"""The large files that are being read in parts, kept open from one part to the next.

Rule: bytes come from a file that was opened below the root by `Source.open`. After they are in the buffer every name on
its way is looked at, from the root on: each still leads to the very folder, and the last one to the very file, which is
as recorded. A file is in the hands of one thread at a time. Whatever is wrong with one is no verdict: it is closed, and
opened and judged as if it never had been kept.
"""

import os
from contextlib import suppress

from tartapefs.archive.member import Member
from tartapefs.source.drift import agrees
from tartapefs.source.folder import Source, Way

LARGE = 1 << 20  # bytes: what nobody reads in one request
_MOST = 4  # as many as readers that a mount serves at once
_DEEPEST = 3  # folders below the root; to look at more takes as long as to open the file anew


class Kept:
    """Files of `source` by the starts of their members. Usable from many threads."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[int, tuple[int, Way]] = {}  # descriptors, and how they are come by; each change is atomic

    def read(self, member: Member, part: memoryview, position: int, at_home: bool) -> bool:
        """Fills `part` from `position` of the member's body on, if its file is kept and as recorded; else False."""
        file = self._files.pop(member.start, None)
        if file is None:
            return False
        fd, way = file
        is_right = False
        try:
            if os.preadv(fd, (part,), position) == len(part):
                self._source.wait_for_holes(fd, way[-1][1])
                found = self._source.end_of(way)
                is_right = found is not None and agrees(member, found, at_home)
        except OSError:
            pass
        finally:
            if is_right and position + len(part) < member.size:  # more of it may be wanted
                self._keep(member.start, file)
            else:
                os.close(fd)
        return is_right

    def keep(self, member: Member, fd: int, found: os.stat_result) -> None:
        """Takes over the descriptor `fd` of the member's file, whose `fstat` is `found`."""
        way: Way = []
        path = member.path
        if path.count(b"/") <= _DEEPEST:
            with suppress(OSError):
                way = self._source.way_to(path)
        if way and way[-1][1:] == (found.st_dev, found.st_ino):
            self._keep(member.start, (fd, way))
        else:
            os.close(fd)

    def _keep(self, start: int, file: tuple[int, Way]) -> None:
        if self._files.setdefault(start, file) is not file:  # another thread has kept one
            os.close(file[0])
        elif len(self._files) > _MOST:
            with suppress(StopIteration, RuntimeError, KeyError):  # other threads are at it, too
                os.close(self._files.pop(next(iter(self._files)))[0])

    def close(self) -> None:
        """Closes all; those that are being read, once they are kept again and this is called again, or at the end."""
        with suppress(KeyError):
            while True:
                os.close(self._files.popitem()[1][0])

    def __del__(self) -> None:
        self.close()
