"""Compares a tape's members with the source: as `drift.inspect`, but judges a folder by its names.

Rule: a folder that differs only in times is as recorded if its names are: if each recorded name is there, with its
type and, at home, its inode, and no other name would be a member. So a name that the recording left out may come and
go; if additions are allowed, so may every name that was not recorded. What lies in a folder has its own comparison.

The names of a folder are compared when its times have changed, and then not again until they change once more. Its
`stat` is taken before its names are listed, so the next inspection sees whatever happens to them meanwhile.
"""

import errno
import os
import stat
import time
from dataclasses import dataclass
from itertools import chain

from tartapefs.archive.member import Member
from tartapefs.base.errors import Difference
from tartapefs.index.recording import Recording
from tartapefs.source.drift import differences, inspect, only_times
from tartapefs.source.exclusion import is_recordable, recorded_exclusion
from tartapefs.source.folder import Folder, Source

_ATTEMPTS = 3  # to list a folder that changes meanwhile
_TICK_NS = 2 * 10**9  # no file system stamps folders more coarsely
_NAMED = 10  # additions of which the names are told
_NO_LISTING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.EACCES)

_Stamps = tuple[int, int, int]  # mtime, ctime, inode


@dataclass(frozen=True, slots=True)
class Additions:
    """Names that were not recorded and would be members: `count` in all, and `paths` of at most 10."""

    count: int
    paths: tuple[bytes, ...]


class Inspector:
    """Compares members of `tape` with what is in `source` now. Usable from many threads.

    `allow_additions`: a name that was not recorded is no difference. `additions` then tells which were seen.
    """

    def __init__(self, tape: Recording, source: Source, at_home: bool, allow_additions: bool = False) -> None:
        self.tape = tape
        self.source = source
        self.at_home = at_home
        self._is_excluded = recorded_exclusion(tape.excluded)
        self._allow_additions = allow_additions
        self._additions: dict[int, Additions] = {}  # by the starts of their folders, as these were listed last
        self._unchanged: dict[int, _Stamps] = {}  # stamps of folders whose names were as recorded, by their starts

    def inspect(self, member: Member) -> tuple[Difference, ...]:
        """The differences of `member` from the recording, as `drift.inspect` returns them.

        A folder that a later generation has again has none: what is there now is compared with the latest header.

        Raises OSError if the source cannot be read, and TapeFormatError for a damaged index.
        """
        if member.is_directory and self.tape.is_superseded(member):
            return ()
        found = inspect(member, self.source, self.at_home)
        return () if found and member.is_directory and self._names_agree(member) else found

    @property
    def additions(self) -> Additions:
        """The additions in all folders of which the names were compared."""
        found = list(self._additions.values())  # one call: other threads add to it
        paths = chain.from_iterable(additions.paths for additions in found)
        return Additions(sum(additions.count for additions in found), tuple(sorted(paths)[:_NAMED]))

    def has_additions(self, folder: Member) -> bool:
        """Whether there were additions when the names of this folder were compared last."""
        return folder.start in self._additions

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
        added: list[bytes] = []
        for name in folder.names(self.tape.one_file_system):
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
            elif self._is_member(path := member.path + b"/" + name if member.path else name, found.st_mode):
                if not self._allow_additions:
                    return False
                added.append(path)
        if added:
            self._additions[member.start] = Additions(len(added), tuple(added[:_NAMED]))
        else:
            self._additions.pop(member.start, None)
        return child is None

    def _is_member(self, path: bytes, mode: int) -> bool:
        """Whether a name that was not recorded would be a member of a new recording, as far as can be told."""
        return is_recordable(path, mode, self._is_excluded or _excludes_nothing)


def _excludes_nothing(path: bytes, is_directory: bool) -> bool:
    return False


def _stamps(found: os.stat_result) -> _Stamps:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
