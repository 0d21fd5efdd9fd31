"""The comparison of a tape's members with its source: as `integrity.inspect`, but a folder is judged by its names.

Rule: a folder that differs in nothing but times is as recorded if the names in it are, that is, if each recorded one is
there, of its type and, at home, with its inode, and if no other has a place in the archive. So a name that the
recording left out may come and go. Whether what lies in a folder is as recorded is for its own comparison to see.

The names of a folder are looked at when its times have moved, and then not again before they move once more. Its
`stat` is taken before its names, so whatever happens to them meanwhile shows at the next look.
"""

import errno
import os
import stat
import time

from tartapefs.archive.member import Member
from tartapefs.base.errors import Difference
from tartapefs.index.recording import Recording
from tartapefs.source.drift import differences, inspect, only_times
from tartapefs.source.exclusion import has_a_place, recorded_exclusion
from tartapefs.source.folder import Folder, Source

_LOOKS = 3  # at the names of a folder that does not rest
_TICK_NS = 2 * 10**9  # no clock that stamps folders takes longer to move
_NO_LISTING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.EACCES)

_Stamps = tuple[int, int, int]  # mtime, ctime, inode


class Inspector:
    """Compares members of `tape` with what is in `source` now. Usable from many threads."""

    def __init__(self, tape: Recording, source: Source, at_home: bool) -> None:
        self.tape = tape
        self.source = source
        self.at_home = at_home
        self._is_left_out = recorded_exclusion(tape.excluded)
        self._known: dict[int, _Stamps] = {}  # of folders whose names were as recorded, by their starts

    def inspect(self, member: Member) -> tuple[Difference, ...]:
        """What of `member` is not as recorded now, as `integrity.inspect` tells it.

        Raises OSError where that cannot be told, and TapeFormatError for a damaged index.
        """
        found = inspect(member, self.source, self.at_home)
        return () if found and member.is_directory and self._has_its_names(member) else found

    def _has_its_names(self, member: Member) -> bool:
        """Whether it differs in nothing but times, and its names are as recorded."""
        agrees = False
        for _ in range(_LOOKS):
            try:
                folder = self.source.folder(member.path)
            except OSError as error:
                if error.errno in _NO_LISTING:
                    return False
                raise
            try:
                begun, found = time.time_ns(), folder.stat()
                if not only_times(differences(member, found, b"", self.at_home)):
                    return False
                stamps = _stamps(found)
                if self._known.get(member.start) == stamps:
                    return True
                agrees = self._agrees(member, folder)
                if _stamps(folder.stat()) != stamps:
                    continue
                # Or they could stay while a name is added, or a server has shown names that it kept from before.
                if agrees and begun - max(stamps[:2]) > _TICK_NS and self.source.is_local(found):
                    self._known[member.start] = stamps
                return agrees
            finally:
                folder.close()
        return agrees

    def _agrees(self, member: Member, folder: Folder) -> bool:
        children = self.tape.children(member)
        child = next(children, None)
        for name in folder.names():
            recorded = child is not None and child.name.rstrip(b"/") == member.name + name
            try:
                found = folder.lstat(name)
            except FileNotFoundError:
                continue
            if child is not None and recorded:
                if stat.S_IFMT(found.st_mode) != stat.S_IFMT(child.mode):
                    return False
                if self.at_home and found.st_ino != child.ino:
                    return False
                child = next(children, None)
            elif self._counts(member.path + b"/" + name if member.path else name, found.st_mode):
                return False
        return child is None

    def _counts(self, path: bytes, mode: int) -> bool:
        """Whether a name that was not recorded makes another folder of the one it is in."""
        return self._is_left_out is None or has_a_place(path, mode, self._is_left_out)


def _stamps(found: os.stat_result) -> _Stamps:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
