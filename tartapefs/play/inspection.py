"""Compares a tape's members with the source: as `drift.inspect`, but judges a folder by its names.

Rule: a folder that differs only in times is as recorded if its names are: if each recorded name is there, with its
type and, at home, its inode, and no other name would be a member. So a name that the recording left out may come and
go. What lies in a folder has its own comparison.

The names of a folder are compared when its times have changed, and then not again until they change once more. Its
`stat` is taken before its names are listed, so the next inspection sees whatever happens to them meanwhile.
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

_ATTEMPTS = 3  # to list a folder that changes meanwhile
_TICK_NS = 2 * 10**9  # no file system stamps folders more coarsely
_NO_LISTING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.EACCES)

_Stamps = tuple[int, int, int]  # mtime, ctime, inode


class Inspector:
    """Compares members of `tape` with what is in `source` now. Usable from many threads."""

    def __init__(self, tape: Recording, source: Source, at_home: bool) -> None:
        self.tape = tape
        self.source = source
        self.at_home = at_home
        self._is_excluded = recorded_exclusion(tape.excluded)
        self._unchanged: dict[int, _Stamps] = {}  # stamps of folders whose names were as recorded, by their starts

    def inspect(self, member: Member) -> tuple[Difference, ...]:
        """The differences of `member` from the recording, as `drift.inspect` returns them.

        Raises OSError if the source cannot be read, and TapeFormatError for a damaged index.
        """
        found = inspect(member, self.source, self.at_home)
        return () if found and member.is_directory and self._names_agree(member) else found

    def _names_agree(self, member: Member) -> bool:
        """Whether the folder differs only in times, and its names are as recorded."""
        agrees = False
        for _ in range(_ATTEMPTS):
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
                if self._unchanged.get(member.start) == stamps:
                    return True
                agrees = self._compare_names(member, folder)
                if _stamps(folder.stat()) != stamps:
                    continue
                # Else a name could be added within the same tick, or a server could have shown names of its cache.
                if agrees and begun - max(stamps[:2]) > _TICK_NS and self.source.is_local(found):
                    self._unchanged[member.start] = stamps
                return agrees
            finally:
                folder.close()
        return agrees

    def _compare_names(self, member: Member, folder: Folder) -> bool:
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
            elif self._is_member(member.path + b"/" + name if member.path else name, found.st_mode):
                return False
        return child is None

    def _is_member(self, path: bytes, mode: int) -> bool:
        """Whether a name that was not recorded would be a member of a new recording."""
        return self._is_excluded is None or has_a_place(path, mode, self._is_excluded)


def _stamps(found: os.stat_result) -> _Stamps:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
